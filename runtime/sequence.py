"""One output while it is made: the core's tokens in, text and logprobs out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .detokenizer import StopStrings, make_detokenizer
from .requests import Logprob, PositionLogprobs, SamplingParams
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from ._core import Output


@dataclass(slots=True)
class Delta:
    """What is new of one output.

    index         of the output among those of its prompt
    text          what can be told now: stop strings and incomplete characters are held back
    offsets       for each token the characters that came before it, held back or not; only with logprobs
    prompt_logprobs  once, if asked for
    error         why the output failed; then it has ended
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None = None
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0
    error: str | None = None


class Sequence:
    """The output number `index` of a prompt. num_tokens: generated so far."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        prompt_token_ids: list[int],
        params: SamplingParams,
        end_token_ids: tuple[int, ...],
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._params = params
        self._end_token_ids = end_token_ids
        self._detokenizer = (
            make_detokenizer(tokenizer, prompt_token_ids, params.skip_special_tokens) if params.detokenize else None
        )
        strings = params.stop_strings
        self._stops = StopStrings(strings, params.include_stop_str_in_output) if strings else None
        self._num_characters = 0

    def advance(self, output: Output) -> Delta:
        """What `output` adds. A stop string ends it even where the core goes on."""
        token_ids, reason = output.token_ids, output.finish_reason
        delta = Delta(self.index, "", token_ids, finish_reason=reason, num_cached_tokens=output.num_cached_tokens)
        if reason == "error":
            delta.error = output.error or "the engine failed"
        if output.stop_token_id is not None and output.stop_token_id not in self._end_token_ids:
            delta.stop_reason = output.stop_token_id
        self._add_text(delta, output.stop_token_id is not None)
        if output.logprobs is not None:
            delta.logprobs = [self._position(entries) for entries in output.logprobs[: len(delta.token_ids)]]
        if output.prompt_logprobs is not None:
            delta.prompt_logprobs = [
                None if entries is None else self._position(entries) for entries in output.prompt_logprobs
            ]
        return delta

    def _add_text(self, delta: Delta, ends_with_stop_token: bool) -> None:
        if self._detokenizer is None:
            self.num_tokens += len(delta.token_ids)
            return
        hidden = (
            len(delta.token_ids) - 1 if ends_with_stop_token and not self._params.include_stop_str_in_output else -1
        )
        wants_offsets = self._params.logprobs is not None
        parts = []
        for place, token_id in enumerate(delta.token_ids):
            if wants_offsets:
                delta.offsets.append(self._num_characters)
            text = "" if place == hidden else self._detokenizer.push(token_id)
            self._num_characters += len(text)
            self.num_tokens += 1
            if self._stops is not None and self.num_tokens > self._params.min_tokens:
                text = self._stops.push(text)
                if self._stops.found is not None:
                    self._end_at_stop_string(delta, place, self._stops.found)
                    parts.append(text)
                    break
            parts.append(text)
        if delta.finish_reason is not None and (self._stops is None or self._stops.found is None):
            parts.append(self._flush())
        delta.text = parts[0] if len(parts) == 1 else "".join(parts)

    def _end_at_stop_string(self, delta: Delta, place: int, found: str) -> None:
        delta.token_ids = delta.token_ids[: place + 1]
        delta.finish_reason, delta.stop_reason, delta.error = "stop", found, None

    def _flush(self) -> str:
        assert self._detokenizer is not None
        rest = self._detokenizer.finish()
        return self._stops.push(rest) + self._stops.finish() if self._stops is not None else rest

    def _position(self, entries: list[tuple[int, float, int]]) -> PositionLogprobs:
        described: PositionLogprobs = {}
        for token_id, logprob, rank in entries:
            if token_id not in described:
                described[token_id] = Logprob(logprob, rank, self._tokenizer.token_text(token_id))
        return described
