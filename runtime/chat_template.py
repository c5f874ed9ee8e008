"""Messages to a prompt, by the checkpoint's Jinja template, in the environment that transformers gives it.

A template comes from anywhere: it sees plain data only, in Jinja's sandbox, in a process with limits of its own.
"""

from __future__ import annotations

from typing import Any

from ..engines.documents import choose_template
from ..engines.errors import RequestError
from .template_process import TemplateProcess

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Message = dict[str, Any]


class ChatTemplate:
    """A chat template. It is compiled when first used, since most of a second start needs none. For any thread.

    special_tokens: "bos_token" and so on, as variables of the template
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        self.source = source
        self._special_tokens = special_tokens
        self._process = TemplateProcess(source)

    @property
    def compiled(self) -> bool:
        """Whether a rendering could begin at once."""
        return self._process.compiled

    def compile(self) -> None:
        """Makes it ready. Raises RequestError where it is no Jinja, or takes too much time or memory."""
        self._process.compile()

    def close(self) -> None:
        """Ends what is being rendered, and renders no more."""
        self._process.close()

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`. continue_final_message leaves the last one open, to be gone on with.

        Takes at most so much time and memory (template_worker.py); meanwhile the thread waits, others run. Raises
        RequestError with what the template says.
        """
        final = ""
        if continue_final_message:
            final = _final_text(messages)
            messages = [*messages[:-1], _tagged(messages[-1])]
        known = {**self._special_tokens, **(variables or {})}
        known |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        known.setdefault("documents", None)
        text = self._process.render(known)
        return _cut_at_tag(text, final) if continue_final_message else text


def read_chat_template(jinja: str | None, tokenizer_config: dict[str, Any]) -> ChatTemplate | None:
    """The template that an engine has (engines/documents.py), with its special tokens."""
    source = choose_template(jinja, tokenizer_config)
    if source is None:
        return None
    tokens = {name: _token_text(tokenizer_config.get(name)) for name in _SPECIAL_TOKENS}
    return ChatTemplate(source, {name: text for name, text in tokens.items() if text is not None})


def _token_text(token: object) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _final_text(messages: list[Message]) -> str:
    content = messages[-1].get("content")
    if not isinstance(content, str):
        raise RequestError("continue_final_message: the last message has no text to continue.")
    return content


def _tagged(message: Message) -> Message:
    return {**message, "content": message["content"] + _CONTINUE_TAG}


def _cut_at_tag(text: str, final: str) -> str:
    """The prompt up to where the final message ends, spaces as the template leaves them."""
    tag = _CONTINUE_TAG.strip()
    if final.strip() not in text or tag not in text:
        raise RequestError(
            "continue_final_message: the chat template drops the last message or parts of it; it cannot go on."
        )
    at = text.rindex(tag)
    kept = text[:at]
    return kept if text[at : at + len(_CONTINUE_TAG)] == _CONTINUE_TAG else kept.rstrip()
