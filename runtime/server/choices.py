"""What both endpoints keep of each choice while it is made, and what they count."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...engines.errors import EngineryError
from ..engine import Engine, Request
from ..pump import DeltaStream
from ..requests import PositionLogprobs, SamplingParams
from ..sequence import Delta


@dataclass
class Choice:
    """Everything of one choice so far."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None

    def add(self, delta: Delta) -> None:
        """Takes what is new."""
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        self.offsets += delta.offsets
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


class Run:
    """The prompts of one HTTP request in the engine. Output i of prompt p is number p · n + i.

    num_choices; usage() counts every prompt once and every output.
    """

    def __init__(self, engine: Engine, prompts: list[list[int]], params: SamplingParams, uncounted: bool) -> None:
        self.num_choices = len(prompts) * params.n
        self.stream = DeltaStream(self.num_choices)
        self._num_prompt_tokens = sum(map(len, prompts))
        self._num_completion_tokens = 0
        self._cached_tokens: dict[int, int] = {}
        self._n = params.n
        self._uncounted = uncounted
        self._tells_cached = engine.config.enable_prefix_caching
        self._requests: list[Request] = []
        try:
            for index, prompt in enumerate(prompts):
                request = engine.start(prompt, params, self.stream, first_index=index * params.n)
                self._requests.append(request)
        except BaseException:
            self.abort()
            raise

    async def deltas(self) -> list[Delta]:
        """New deltas; empty at the end. Raises EngineryError where an output failed."""
        deltas = await self.stream.get()
        for delta in deltas:
            if delta.error is not None:
                raise EngineryError(delta.error)
            if self._uncounted:
                delta.token_ids, delta.text, delta.offsets = [], "", []
                delta.logprobs = None if delta.logprobs is None else []
                delta.finish_reason = delta.finish_reason and "length"
            self._num_completion_tokens += len(delta.token_ids)
            prompt, output = divmod(delta.index, self._n)
            if output == 0:
                self._cached_tokens[prompt] = delta.num_cached_tokens
        return deltas

    async def gather(self) -> list[Choice]:
        """All choices, when they have ended."""
        choices = [Choice() for _ in range(self.num_choices)]
        while deltas := await self.deltas():
            for delta in deltas:
                choices[delta.index].add(delta)
        return choices

    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        usage: dict[str, Any] = {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_completion_tokens,
        }
        if self._tells_cached:
            usage["prompt_tokens_details"] = {"cached_tokens": sum(self._cached_tokens.values())}
        return usage

    def abort(self) -> None:
        """Ends what still runs."""
        for request in self._requests:
            request.abort()
