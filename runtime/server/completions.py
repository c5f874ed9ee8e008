"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ..engine import Engine
from ..requests import PositionLogprobs
from .choices import Choice, Run
from .errors import ApiError, invalid
from .logprobs import LogprobWriter, prompt_logprobs_json
from .prompts import MOST_CHOICES, Prompt, read_prompts, spell
from .protocol import LARGEST_COUNT, LARGEST_LOGPROBS, Body, Common, parse_common, require_room
from .state import ServerState
from .streaming import DONE, EventStream, event, quote, unless_disconnected

_DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request. logprobs: how many per token, None for none; asks_prompt: whether prompt_logprobs was set."""

    common: Common
    echo: bool
    logprobs: int | None
    asks_prompt: bool


def parse_completion(body: Body, engine: Engine) -> CompletionRequest:
    """Checks a request, but for its prompt. Raises ApiError, InvalidField."""
    logprobs = body.integer("logprobs", 0, LARGEST_LOGPROBS)
    echo = body.boolean("echo")
    common = parse_common(body, engine.model, logprobs, body.integer("max_tokens", 0, LARGEST_COUNT))
    asks_prompt = common.params.prompt_logprobs is not None
    params = common.params.clone(max_tokens=common.params.max_tokens or _DEFAULT_MAX_TOKENS)
    if echo and logprobs is not None and not asks_prompt:
        params = params.clone(prompt_logprobs=logprobs)
    common = Common(**{**common.__dict__, "params": params})
    return CompletionRequest(common, echo, logprobs, asks_prompt)


async def completions(http: HttpRequest, body: Body, state: ServerState) -> Response:
    """Answers a completion request, at once or as a stream."""
    engine = state.require_engine()
    state.require_model(body.get("model"))
    request = parse_completion(body, engine)
    prompts = await read_prompts(body.get("prompt"), engine, body.boolean("add_special_tokens", default=True))
    params, max_tokens = request.common.params, request.common.max_tokens
    if len(prompts) * params.n > MOST_CHOICES:
        raise invalid(f"prompts times n must be at most {MOST_CHOICES}, got {len(prompts)} · {params.n}.", "n")
    for prompt in prompts:
        require_room(len(prompt.token_ids), max_tokens, engine.model, "max_tokens")
    run = Run(engine, [prompt.token_ids for prompt in prompts], params, uncounted=max_tokens == 0)
    answer = CompletionAnswer(request, prompts, run, engine, state)
    if request.common.stream:
        return EventStream(answer.events(), run.abort)
    try:
        return JSONResponse(answer.whole(await unless_disconnected(http, run.gather())))
    finally:
        run.abort()


class CompletionAnswer:
    """One answer, in its JSON forms."""

    def __init__(
        self, request: CompletionRequest, prompts: list[Prompt], run: Run, engine: Engine, state: ServerState
    ) -> None:
        self._request, self._prompts, self._run = request, prompts, run
        self._n = request.common.params.n
        self._tokenizer = engine.tokenizer
        self._logprobs = LogprobWriter(engine.tokenizer, frozenset(), request.common.tokens_as_ids)
        self._spelled: dict[int, tuple[str, list[int]]] = {}
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": state.answering_name(request.common.model),
            "system_fingerprint": state.fingerprint,
        }
        self._prefix = event(self._head).decode()[:-3] + ',"choices":['
        self._is_plain = (
            request.logprobs is None
            and not request.asks_prompt
            and not request.common.return_token_ids
            and not request.common.continuous_usage
        )

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """The answer of a request without streaming."""
        written = [self._choice(index, choice, begins=True) for index, choice in enumerate(choices)]
        return {**self._head, "choices": written, "usage": self._run.usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """The answer of a request with streaming."""
        begun: set[int] = set()
        while deltas := await self._run.deltas():
            # What came together goes out together: one write to the socket.
            data = b""
            for delta in deltas:
                begins = delta.index not in begun
                begun.add(delta.index)
                if self._is_plain and delta.finish_reason is None and not (begins and self._request.echo):
                    data += self._plain_chunk(delta.index, delta.text)
                else:
                    choice = Choice()
                    choice.add(delta)
                    data += self._event(self._choice(delta.index, choice, begins))
            yield data
        if self._request.common.include_usage:
            yield event({**self._head, "choices": [], "usage": self._run.usage()}) + DONE
        else:
            yield DONE

    def _plain_chunk(self, index: int, text: str) -> bytes:
        """What most chunks are, without the detour over dicts."""
        usage = ',"usage":null' if self._request.common.include_usage else ""
        return (
            f'{self._prefix}{{"index":{index},"text":{quote(text)},"logprobs":null,"finish_reason":null}}]{usage}}}\n\n'
        ).encode()

    def _event(self, choice: dict[str, Any]) -> bytes:
        document: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._request.common.include_usage:
            document["usage"] = self._run.usage() if self._request.common.continuous_usage else None
        return event(document)

    def _choice(self, index: int, choice: Choice, begins: bool) -> dict[str, Any]:
        """A choice, or what is new of it. begins: with what comes once, the echo and the prompt's logprobs."""
        if choice.finish_reason == "abort":
            raise ApiError(503, "The server is going down.", headers={"Retry-After": "1"})
        text = "".join(choice.text)
        written: dict[str, Any] = {
            "index": index,
            "text": self._prompt_text(index) + text if begins and self._request.echo else text,
            "logprobs": self._written_logprobs(index, choice, begins),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if begins and self._request.asks_prompt and choice.prompt_logprobs is not None:
            written["prompt_logprobs"] = prompt_logprobs_json(choice.prompt_logprobs)
        if self._request.common.return_token_ids:
            written["token_ids"] = choice.token_ids
            if begins:
                written["prompt_token_ids"] = self._prompts[index // self._n].token_ids
        return written

    def _written_logprobs(self, index: int, choice: Choice, begins: bool) -> dict[str, list[Any]] | None:
        if self._request.logprobs is None:
            return None
        token_ids: list[int] = []
        logprobs: list[PositionLogprobs | None] = []
        offsets: list[int] = []
        shift = 0
        if self._request.echo:
            shift = len(self._prompt_text(index))
            if begins:
                token_ids += self._prompts[index // self._n].token_ids
                logprobs += choice.prompt_logprobs or []
                offsets += [min(offset, shift) for offset in self._spell(index)[1]]
        token_ids += choice.token_ids
        logprobs += choice.logprobs
        offsets += [offset + shift for offset in choice.offsets]
        return self._logprobs.completion(token_ids, logprobs, offsets)

    def _prompt_text(self, index: int) -> str:
        text = self._prompts[index // self._n].text
        return self._spell(index)[0] if text is None else text

    def _spell(self, index: int) -> tuple[str, list[int]]:
        prompt = index // self._n
        if prompt not in self._spelled:
            self._spelled[prompt] = spell(self._tokenizer, self._prompts[prompt].token_ids)
        return self._spelled[prompt]
