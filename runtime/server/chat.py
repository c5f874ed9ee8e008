"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ..chat_template import ChatTemplate, Message
from ..engine import Engine
from ..sequence import Delta
from .choices import Choice, Run
from .errors import ApiError, invalid
from .logprobs import LogprobWriter, hidden_ids, prompt_logprobs_json
from .messages import parse_messages
from .prompts import encode
from .protocol import LARGEST_COUNT, LARGEST_LOGPROBS, Body, Common, parse_common, refuse, require_room
from .state import ServerState
from .streaming import DONE, EventStream, event, quote, unless_disconnected


@dataclass(frozen=True)
class ChatRequest:
    """A checked request. echo: what the answer begins with; top_logprobs: None where no logprobs were asked for."""

    common: Common
    messages: list[Message]
    prompt: str
    add_special_tokens: bool
    echo: str
    top_logprobs: int | None
    max_tokens_name: str


async def parse_chat(body: Body, engine: Engine, state: ServerState) -> ChatRequest:
    """Checks a request and renders its prompt. Raises ApiError, RequestError."""
    top_logprobs = _top_logprobs(body)
    max_tokens_name = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    max_tokens = body.integer(max_tokens_name, 1, LARGEST_COUNT)
    common = parse_common(body, engine.model, top_logprobs, max_tokens)
    template = engine.model.chat_template
    if template is None:
        raise invalid(
            "This engine has no chat template, so it completes text alone: use /v1/completions, or build it from a "
            "checkpoint that has a chat_template.jinja.",
            "messages",
        )
    messages = parse_messages(body.get("messages"), template)
    # One thread for all: a template renders one prompt at a time, and who has gone by then is left out.
    prompt = await asyncio.get_running_loop().run_in_executor(state.renderer, _rendering(body, template, messages))
    last = messages[-1]
    echo = (last["content"] or "") if body.boolean("echo") and last["role"] == "assistant" else ""
    special = body.boolean("add_special_tokens")
    return ChatRequest(common, messages, prompt, special, echo, top_logprobs, max_tokens_name)


def _top_logprobs(body: Body) -> int | None:
    wants, top = body.boolean("logprobs"), body.integer("top_logprobs", 0, LARGEST_LOGPROBS)
    if top is not None and not wants:
        if top == 0:
            return None
        raise invalid("top_logprobs is only allowed when logprobs is true.", "top_logprobs", "invalid_value")
    return (top or 0) if wants else None


def _rendering(body: Body, template: ChatTemplate, messages: list[Message]) -> Callable[[], str]:
    """The rendering of the prompt, not begun."""
    goes_on = body.boolean("continue_final_message")
    add_generation_prompt = body.boolean("add_generation_prompt", default=not goes_on)
    if goes_on and add_generation_prompt:
        raise invalid("continue_final_message and add_generation_prompt exclude each other.", "continue_final_message")
    given = body.get("chat_template_kwargs")
    variables: dict[str, Any] = {} if given is None else given
    if not isinstance(variables, dict):
        refuse("chat_template_kwargs", "an object", variables)
    if body.get("chat_template") is not None:
        raise invalid("chat_template is not taken from requests.", "chat_template", "unsupported_parameter")
    effort = body.text("reasoning_effort")
    documents = body.get("documents")
    if effort is not None:
        variables = {"reasoning_effort": effort, **variables}
    if documents is not None:
        variables = {"documents": documents, **variables}
    return functools.partial(
        template.render,
        messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=goes_on,
        variables=variables,
    )


async def chat_completions(http: HttpRequest, body: Body, state: ServerState) -> Response:
    """Answers a chat request, at once or as a stream."""
    engine = state.require_engine()
    state.require_model(body.get("model"))
    chat = await unless_disconnected(http, parse_chat(body, engine, state))
    token_ids = await encode(engine, chat.prompt, chat.add_special_tokens)
    engine.check_prompt(token_ids)
    require_room(len(token_ids), chat.common.max_tokens, engine.model, chat.max_tokens_name)
    run = Run(engine, [token_ids], chat.common.params, uncounted=False)
    answer = ChatAnswer(chat, token_ids, run, engine, state)
    if chat.common.stream:
        return EventStream(answer.events(), run.abort)
    try:
        return JSONResponse(answer.whole(await unless_disconnected(http, run.gather())))
    finally:
        run.abort()


class ChatAnswer:
    """One answer, in its JSON forms."""

    def __init__(self, chat: ChatRequest, token_ids: list[int], run: Run, engine: Engine, state: ServerState) -> None:
        self._chat, self._prompt_token_ids, self._run = chat, token_ids, run
        self._logprobs = LogprobWriter(
            engine.tokenizer, hidden_ids(engine, chat.common.params), chat.common.tokens_as_ids
        )
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if chat.common.stream else "chat.completion",
            "created": int(time.time()),
            "model": state.answering_name(chat.common.model),
            "system_fingerprint": state.fingerprint,
        }
        self._prefix = event(self._head).decode()[:-3] + ',"choices":['

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """The answer of a request without streaming."""
        written = [self._choice(index, choice) for index, choice in enumerate(choices)]
        document: dict[str, Any] = {**self._head, "choices": written}
        document["usage"] = self._run.usage()
        if (logprobs := choices[0].prompt_logprobs) is not None:
            document["prompt_logprobs"] = prompt_logprobs_json(logprobs)
        if self._chat.common.return_token_ids:
            document["prompt_token_ids"] = self._prompt_token_ids
        return document

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        if choice.finish_reason == "abort":
            raise ApiError(503, "The server is going down.", headers={"Retry-After": "1"})
        written: dict[str, Any] = {
            "index": index,
            "message": {
                "role": "assistant",
                "content": self._chat.echo + "".join(choice.text),
                "refusal": None,
            },
            "logprobs": self._content(choice.token_ids, choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._chat.common.return_token_ids:
            written["token_ids"] = choice.token_ids
        return written

    def _content(self, token_ids: list[int], logprobs: Any) -> dict[str, Any] | None:
        top = self._chat.top_logprobs
        return None if top is None else {"content": self._logprobs.chat(token_ids, logprobs, top), "refusal": None}

    async def events(self) -> AsyncIterator[bytes]:
        """The answer of a request with streaming."""
        begun: set[int] = set()
        while deltas := await self._run.deltas():
            # What came together goes out together: one write to the socket.
            data = b""
            for delta in deltas:
                if delta.index not in begun:
                    begun.add(delta.index)
                    data += self._begin(delta)
                data += self._chunks(delta)
            yield data
        if self._chat.common.include_usage:
            yield event({**self._head, "choices": [], "usage": self._run.usage()}) + DONE
        else:
            yield DONE

    def _begin(self, delta: Delta) -> bytes:
        data = self._event(delta.index, {"role": "assistant", "content": ""}, first=True, prompt=delta.prompt_logprobs)
        return data + self._event(delta.index, {"content": self._chat.echo}) if self._chat.echo else data

    def _chunks(self, delta: Delta) -> bytes:
        data = b""
        if delta.text or delta.token_ids:
            plain = self._chat.top_logprobs is None and not self._chat.common.return_token_ids
            if plain and not self._chat.common.continuous_usage:
                data = self._plain_chunk(delta)
            else:
                logprobs = self._content(delta.token_ids, delta.logprobs)
                data = self._event(delta.index, {"content": delta.text}, logprobs, token_ids=delta.token_ids)
        if delta.finish_reason is not None:
            if delta.finish_reason == "abort":
                raise ApiError(503, "The server is going down.")
            data += self._event(delta.index, {}, finish=delta.finish_reason, stop=delta.stop_reason)
        return data

    def _plain_chunk(self, delta: Delta) -> bytes:
        """What most chunks are, without the detour over dicts."""
        usage = ',"usage":null' if self._chat.common.include_usage else ""
        return (
            f'{self._prefix}{{"index":{delta.index},"delta":{{"content":{quote(delta.text)}}},"logprobs":null,'
            f'"finish_reason":null}}]{usage}}}\n\n'
        ).encode()

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        *,
        finish: str | None = None,
        stop: int | str | None = None,
        token_ids: list[int] | None = None,
        first: bool = False,
        prompt: Any = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        if finish is not None:
            choice["stop_reason"] = stop
        document: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._chat.common.return_token_ids:
            if token_ids is not None:
                choice["token_ids"] = token_ids
            if first:
                document["prompt_token_ids"] = self._prompt_token_ids
        if prompt is not None:
            document["prompt_logprobs"] = prompt_logprobs_json(prompt)
        if self._chat.common.include_usage:
            document["usage"] = self._run.usage() if self._chat.common.continuous_usage else None
        return event(document)
