"""Messages to a prompt, by the checkpoint's Jinja template, in the environment that transformers gives it.

A template comes from anywhere: it runs in Jinja's sandbox and sees plain data only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ..engines.errors import RequestError

if TYPE_CHECKING:
    from jinja2 import Template

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_LONGEST_PROMPT = 64 << 20

Message = dict[str, Any]


class ChatTemplate:
    """A chat template. Compiled when first used, since most of a second start needs none.

    special_tokens: "bos_token" and so on, as variables of the template
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        self.source = source
        self._special_tokens = special_tokens
        self._template: Template | None = None

    def compile(self) -> Template:
        """The compiled template. Raises RequestError where it is no Jinja."""
        if self._template is None:
            try:
                self._template = _environment().from_string(self.source)
            except Exception as error:
                raise RequestError(f"The engine's chat template cannot be used: {_reason(error)}.") from None
            except RecursionError:
                raise RequestError("The engine's chat template cannot be used: nested too deeply.") from None
        return self._template

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

        Raises RequestError with what the template says.
        """
        template = self.compile()
        final = ""
        if continue_final_message:
            final = _final_text(messages)
            messages = [*messages[:-1], _tagged(messages[-1])]
        known = {**self._special_tokens, **(variables or {})}
        known |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        known.setdefault("documents", None)
        try:
            text = _join(template.generate(**known))
        except Exception as error:
            raise RequestError(f"The chat template refuses these messages: {_reason(error)}.") from None
        return _cut_at_tag(text, final) if continue_final_message else text


def read_chat_template(jinja: str | None, tokenizer_config: dict[str, Any]) -> ChatTemplate | None:
    """The template of chat_template.jinja, or else of tokenizer_config.json (the "default" one of several)."""
    source: object = jinja if jinja is not None else tokenizer_config.get("chat_template")
    if isinstance(source, list):
        named = {str(item.get("name")): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default", next(iter(named.values()), None))
    elif isinstance(source, dict):
        source = source.get("default", next(iter(source.values()), None))
    if not isinstance(source, str) or not source:
        return None
    tokens = {name: _token_text(tokenizer_config.get(name)) for name in _SPECIAL_TOKENS}
    return ChatTemplate(source, {name: text for name, text in tokens.items() if text is not None})


def _join(pieces: Iterator[str]) -> str:
    """The pieces as one text. Raises ValueError before it is absurdly long."""
    text, length = [], 0
    for piece in pieces:
        text.append(piece)
        if (length := length + len(piece)) > _LONGEST_PROMPT:
            raise ValueError(f"it makes a prompt of over {_LONGEST_PROMPT} characters")
    return "".join(text)


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


def _reason(error: BaseException) -> str:
    return str(error).strip().rstrip(".")[:500] or type(error).__name__


def _environment() -> Any:
    import jinja2.ext
    from jinja2 import nodes, pass_context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the assistant said, for training; its body is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    @pass_context
    def unchanged(context: Any, value: Any) -> Any:
        return value

    # Compiling computes nothing: a template may hold 9 ** 9 ** 9. What wants the context cannot be folded either.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
        optimized=False,
        finalize=unchanged,
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
