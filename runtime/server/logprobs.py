"""Logprobs in the shapes of the two endpoints."""

from __future__ import annotations

from typing import Any

from ..engine import Engine
from ..requests import Logprob, PositionLogprobs, SamplingParams
from ..tokenizer import Tokenizer

# JSON has no infinity.
_LEAST = -9999.0


def _finite(logprob: float) -> float:
    return logprob if logprob > _LEAST else _LEAST


def hidden_ids(engine: Engine, params: SamplingParams) -> frozenset[int]:
    """Tokens that are made but do not show in the text."""
    special = engine.tokenizer.special_ids if params.skip_special_tokens else frozenset()
    if params.include_stop_str_in_output:
        return special
    ends = () if params.ignore_eos else engine.model.stop_token_ids
    return special | {*ends, *(params.stop_token_ids or ())}


class LogprobWriter:
    """Writes logprobs for one request. tokens_as_ids: "token_id:17" in place of a token's text."""

    def __init__(self, tokenizer: Tokenizer, hidden_ids: frozenset[int], tokens_as_ids: bool) -> None:
        self._tokenizer, self._hidden_ids, self._tokens_as_ids = tokenizer, hidden_ids, tokens_as_ids

    def chat(self, token_ids: list[int], logprobs: list[PositionLogprobs], count: int) -> list[dict[str, Any]]:
        """`content` of a chat choice: of each token its logprob and those of the `count` likeliest."""
        entries = []
        for token_id, position in zip(token_ids, logprobs, strict=True):
            # The chosen token comes first, wherever it ranks; the likeliest are known by their ranks.
            likeliest = sorted(position.items(), key=lambda item: item[1].rank or 0)[:count]
            entry = self._chat_token(token_id, position[token_id])
            entry["top_logprobs"] = [self._chat_token(other, logprob) for other, logprob in likeliest]
            entries.append(entry)
        return entries

    def _chat_token(self, token_id: int, logprob: Logprob) -> dict[str, Any]:
        # What is not in the text has no bytes, so that the bytes of all tokens spell the text.
        data = None if token_id in self._hidden_ids else list(self._tokenizer.token_bytes(token_id))
        token = f"token_id:{token_id}" if self._tokens_as_ids else self._tokenizer.token_text(token_id)
        return {"token": token, "logprob": _finite(logprob.logprob), "bytes": data}

    def completion(
        self, token_ids: list[int], logprobs: list[PositionLogprobs | None], offsets: list[int]
    ) -> dict[str, list[Any]]:
        """`logprobs` of a completion choice. A position without logprobs (the prompt's first) has nulls."""
        chosen = [
            None if position is None else _finite(position[token_id].logprob)
            for token_id, position in zip(token_ids, logprobs, strict=True)
        ]
        return {
            "tokens": [self._completion_token(token_id) for token_id in token_ids],
            "token_logprobs": chosen,
            "top_logprobs": [None if position is None else self._completion_top(position) for position in logprobs],
            "text_offset": offsets,
        }

    def _completion_top(self, position: PositionLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, logprob in position.items():
            name = self._completion_token(token_id)
            # Two tokens of one text: the second is told by its id.
            top[name if name not in top else f"token_id:{token_id}"] = _finite(logprob.logprob)
        return top

    def _completion_token(self, token_id: int) -> str:
        if self._tokens_as_ids:
            return f"token_id:{token_id}"
        piece = self._tokenizer.piece(token_id)
        if isinstance(piece, str):
            return piece
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def prompt_logprobs_json(logprobs: list[PositionLogprobs | None]) -> list[dict[str, Any] | None]:
    """`prompt_logprobs`, vLLM's extension: of each prompt token, by token id."""
    return [
        None
        if position is None
        else {
            str(token_id): {
                "logprob": _finite(entry.logprob),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token_id, entry in position.items()
        }
        for position in logprobs
    ]
