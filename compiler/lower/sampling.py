"""The entry point `sample` of a GPU plan: what draws each row's next token from the logits that `forward` leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ...engines.expressions import Expression
from ...engines.fields import LARGEST
from ...engines.plan import Buffer, Draws, Operand, Range
from ...plugins.launches import Launch
from ...plugins.sample import cuda as sample
from .lowering import View

# Sequences that have penalties, biases or masks at the same time; each takes 8 bytes for each token of the vocabulary.
EDIT_SLOTS = 64
# OpenAI's most `top_logprobs`.
_MOST_TOP = 20
_TOKEN, _LOGPROB, _RANK = "sample.token", "sample.logprob", "sample.rank"
_TOP_TOKENS, _TOP_LOGPROBS = "sample.top_tokens", "sample.top_logprobs"
# The tokens that the step before has drawn.
DRAWN_TOKENS = Operand("buffer", _TOKEN, 0, ["*", "sequences", 4], "r")
_TOKEN_COUNTS, _TOKEN_BIAS = "sample.token_counts", "sample.token_bias"


class Append(Protocol):
    """Appends launches with these operands to the plan."""

    def __call__(
        self, launches: tuple[Launch, ...], operands: Mapping[str, Operand | None], guard: tuple[Range, ...] = ()
    ) -> None: ...


def lower_sampling(logits: View, vocab: int, arch: int, buffers: dict[str, Buffer], append: Append) -> Draws:
    """Adds the buffers and launches of a sampler of `vocab` tokens."""
    top = min(_MOST_TOP, vocab)
    edited_bytes: Expression = ["*", ["min", "sequences", EDIT_SLOTS], 4 * logits.stride]
    sizes: dict[str, tuple[str, Expression]] = {
        _TOKEN: ("i32", ["*", "rows", 4]),
        _LOGPROB: ("f32", ["*", "rows", 4]),
        _RANK: ("i32", ["*", "rows", 4]),
        _TOP_TOKENS: ("i32", ["*", "rows", 4 * top]),
        _TOP_LOGPROBS: ("f32", ["*", "rows", 4 * top]),
        _TOKEN_COUNTS: ("i32", edited_bytes),
        _TOKEN_BIAS: ("f32", edited_bytes),
    }
    keeps = (_TOKEN, _TOKEN_COUNTS, _TOKEN_BIAS)
    for name, (dtype, size) in sizes.items():
        buffers[name] = Buffer(name, dtype, size, 0, kept=name in keeps)

    def whole(name: str, access: str) -> Operand:
        return Operand("buffer", name, 0, sizes[name][1], access)

    edited = {"token_counts": whole(_TOKEN_COUNTS, "rw"), "token_bias": whole(_TOKEN_BIAS, "rw")}
    entries: dict[str, Operand | None] = {
        name: Operand("input", f"edited_{name}") for name in ("slots", "tokens", "counts", "biases")
    }
    append(
        sample.edit_launches(_sampler(logits, vocab), architecture=arch),
        entries | edited,
        (Range("edits", 1, LARGEST),),
    )
    operands: dict[str, Operand | None] = {
        "logits": Operand("buffer", logits.buffer, 0, logits.extent, "r"),
        "token": whole(_TOKEN, "w"),
        "logprob": whole(_LOGPROB, "w"),
        "rank": whole(_RANK, "w"),
        **edited,
    }
    for guard, sampler in _samplers(logits, vocab).items():
        append(sample.launches(sampler, architecture=arch), operands, guard)
    ranks, tops = sample.launches(_sampler(logits, vocab, rank=True, top=top), architecture=arch)[-2:]
    ranked = {"token": whole(_TOKEN, "r"), "rank": whole(_RANK, "rw")}
    append((ranks,), operands | ranked, (Range("ranked", 1, LARGEST),))
    listed = {"top_tokens": whole(_TOP_TOKENS, "w"), "top_logprobs": whole(_TOP_LOGPROBS, "w")}
    append((tops,), operands | listed, (Range("listed", 1, LARGEST),))
    return Draws(_TOKEN, _LOGPROB, _RANK, _TOP_TOKENS, _TOP_LOGPROBS, top, EDIT_SLOTS)


def _samplers(logits: View, vocab: int) -> dict[tuple[Range, ...], sample.Sampler]:
    """All rows likeliest; some drawn; some edited: by what a step asks for."""
    drawn, edited = Range("drawn", 1, LARGEST), Range("edited", 1, LARGEST)
    return {
        (Range("drawn", 0, 0), Range("edited", 0, 0)): _sampler(logits, vocab, greedy=True),
        (drawn, Range("edited", 0, 0)): _sampler(logits, vocab),
        (edited,): _sampler(logits, vocab, edits=True),
    }


def _sampler(
    logits: View, vocab: int, *, greedy: bool = False, edits: bool = False, rank: bool = False, top: int = 0
) -> sample.Sampler:
    return sample.Sampler(vocab, logits.stride, greedy, edits, rank, top)
