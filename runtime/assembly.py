"""Deltas put together to RequestOutputs."""

from __future__ import annotations

from ..engines.errors import EngineryError
from .requests import CompletionOutput, PositionLogprobs, RequestOutput, RequestOutputKind, SamplingParams
from .sequence import Delta


class Assembly:
    """What has come of one prompt. finished: all of its outputs have ended."""

    def __init__(self, request_id: str, text: str | None, token_ids: list[int], params: SamplingParams) -> None:
        self._request_id, self._text, self._token_ids, self._params = request_id, text, token_ids, params
        self._whole = [self._empty(index) for index in range(params.n)]
        self._news: dict[int, CompletionOutput] = {}
        self._prompt_logprobs: list[PositionLogprobs | None] | None = None
        self._num_cached_tokens = 0
        self._error: str | None = None
        self.finished = False

    def add(self, delta: Delta) -> None:
        """Takes what is new of an output."""
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
        self._num_cached_tokens = max(self._num_cached_tokens, delta.num_cached_tokens)
        self._error = self._error or delta.error
        targets = [self._whole[delta.index]]
        if self._params.output_kind is RequestOutputKind.DELTA:
            targets.append(self._news.setdefault(delta.index, self._empty(delta.index)))
        for output in targets:
            _append(output, delta)
        self.finished = all(output.finished() for output in self._whole)

    def require_success(self) -> None:
        """Raises EngineryError where an output failed."""
        if self._error is not None:
            raise EngineryError(f"Request {self._request_id} failed: {self._error}")

    def output(self, kind: RequestOutputKind) -> RequestOutput:
        """Everything so far, or with DELTA what has come since the last call."""
        if kind is RequestOutputKind.DELTA:
            outputs, self._news = list(self._news.values()), {}
        else:
            outputs = [_copy(output) for output in self._whole]
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._text,
            prompt_token_ids=self._token_ids,
            prompt_logprobs=self._prompt_logprobs,
            outputs=outputs,
            finished=self.finished,
            num_cached_tokens=self._num_cached_tokens,
        )

    def _empty(self, index: int) -> CompletionOutput:
        wants_logprobs = self._params.logprobs is not None
        return CompletionOutput(index, "", [], 0.0 if wants_logprobs else None, [] if wants_logprobs else None)


def _append(output: CompletionOutput, delta: Delta) -> None:
    output.text += delta.text
    output.token_ids.extend(delta.token_ids)
    if delta.logprobs is not None and output.logprobs is not None:
        output.logprobs.extend(delta.logprobs)
        chosen = sum(entries[token].logprob for token, entries in zip(delta.token_ids, delta.logprobs, strict=True))
        output.cumulative_logprob = (output.cumulative_logprob or 0.0) + chosen
    if delta.finish_reason is not None:
        output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason


def _copy(output: CompletionOutput) -> CompletionOutput:
    """So that what was yielded stays as it was."""
    return CompletionOutput(
        output.index,
        output.text,
        list(output.token_ids),
        output.cumulative_logprob,
        None if output.logprobs is None else list(output.logprobs),
        output.finish_reason,
        output.stop_reason,
    )
