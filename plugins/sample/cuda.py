"""sample's kernels for a GPU: one launch for greedy rows, three for others, one more each for ranks and the likeliest.

Rows that are changed before they are drawn from (bias, masks, penalties) have a slot in token_counts and token_bias,
[slots, stride] each, which edit_launches clears and fills; drawn tokens are counted by the kernels themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..launches import Constant, Kernel, Launch, Scratch

_CHUNK = 4096  # sums are made within chunks: another size gives other roundings, and seldom another token
_CAPACITY = 4096  # weights that are collected for the filters; where more could be left, whole rows are searched
_LEVELS = 16
_ROW_STATE = 8
_WARPS = {"scan": 8, "weigh": 8, "choose": 16, "rank": 8, "likeliest": 8, "write_edits": 4}

_EDITS = ("edit_slots", "token_counts", "token_bias", "presence_penalty", "frequency_penalty", "repetition_penalty")
_RESULTS = ("token", "logprob", "rank")
_WEIGHTS = ("row_state", "weights", "level_counts", "level_sums", "chunk_sums")
# In the order of the source; those that are i32 or i64, the others are f32.
_PARAMETERS = {
    "scan": (
        *("logits", "temperature", *_EDITS, *_RESULTS),
        *("chunk_peaks", "chunk_sums", "chunk_tokens", "row_state", "arrivals"),
    ),
    "weigh": ("logits", "temperature", "top_k", "top_p", "min_p", *_EDITS, *_WEIGHTS),
    "choose": (
        *("logits", "top_k", "top_p", "seed", "num_generated", "edit_slots", "token_counts"),
        *(*_RESULTS, *_WEIGHTS, "candidates", "arrivals"),
    ),
    "rank": ("logits", "token", "rank"),
    "likeliest": ("logits", "row_state", "top_tokens", "top_logprobs", "chunk_tops", "chunk_top_tokens", "arrivals"),
    "write_edits": ("slots", "tokens", "counts", "biases", "token_counts", "token_bias"),
}
_I32 = {
    *("edit_slots", "token_counts", "token", "rank", "chunk_tokens", "row_state", "arrivals", "top_k", "num_generated"),
    *("level_counts", "candidates", "top_tokens", "chunk_top_tokens", "slots", "tokens", "counts"),
}
_CONSTANTS = {
    "scan": ("VOCAB", "STRIDE", "CHUNK", "CHUNKS", "PDL"),
    "weigh": ("VOCAB", "STRIDE", "CHUNK", "CHUNKS", "CAPACITY", "PDL"),
    "choose": ("VOCAB", "STRIDE", "CHUNK", "CHUNKS", "CAPACITY", "PDL"),
    "rank": ("VOCAB", "STRIDE", "CHUNK", "PDL"),
    "likeliest": ("VOCAB", "STRIDE", "CHUNK", "CHUNKS", "TOP", "PDL"),
    "write_edits": ("CLEAR", "STRIDE", "CHUNK", "PDL"),
}


@dataclass(frozen=True)
class Sampler:
    """What the rows of a step ask for. vocab: the columns of logits that count; stride: elements from row to row.

    greedy  all rows have temperature 0: their parameters are not read
    edits   some rows have a slot of edits
    rank    ranks are wanted of drawn or edited tokens; without edits, greedy ones have rank 1 anyway
    top     how many of the likeliest tokens are wanted with their logprobs, at most `vocab`
    """

    vocab: int
    stride: int
    greedy: bool = False
    edits: bool = False
    rank: bool = False
    top: int = 0

    @property
    def num_chunks(self) -> int:
        return -(-self.vocab // _CHUNK)


def launches(sampler: Sampler, *, architecture: int) -> tuple[Launch, ...]:
    """In order; scratch of one name is the same memory in all of them. architecture: 80, 90 …"""
    assert sampler.top <= sampler.vocab
    functions = ["scan"]
    if not sampler.greedy:
        functions += ["weigh", "choose"]
    if sampler.rank:
        functions.append("rank")
    if sampler.top:
        functions.append("likeliest")
    scratch = _scratch(sampler)
    plan = []
    for function in functions:
        kernel = _kernel(sampler, function, architecture)
        own = {name: scratch[name] for name, _ in kernel.parameters if name in scratch}
        plan.append(Launch(kernel, (sampler.num_chunks, "rows", 1), scratch=own))
    return tuple(plan)


def edit_launches(sampler: Sampler, *, architecture: int) -> tuple[Launch, Launch]:
    """Clears slots, then writes counts and biases: of `edits` entries (slot, token or -1 to clear, count, bias)."""
    clear, write = (_kernel(sampler, "write_edits", architecture, clear=clear) for clear in (True, False))
    return Launch(clear, ("edits", -(-sampler.stride // _CHUNK), 1)), Launch(write, ("edits", 1, 1))


def _kernel(sampler: Sampler, function: str, architecture: int, clear: bool = False) -> Kernel:
    absent = {"temperature"} if sampler.greedy else set()
    if not sampler.edits and function != "write_edits":
        absent |= set(_EDITS)
    values: dict[str, Constant] = {
        "VOCAB": sampler.vocab,
        "STRIDE": sampler.stride,
        "CHUNK": _CHUNK,
        "CHUNKS": sampler.num_chunks,
        "CAPACITY": _CAPACITY,
        "TOP": sampler.top,
        "CLEAR": clear,
        "PDL": architecture >= 90,
    }
    names = _PARAMETERS[function]
    types = {name: "*i64" if name == "seed" else "*i32" if name in _I32 else "*fp32" for name in names}
    return Kernel(
        plugin="sample",
        function=function,
        role="sample",
        parameters=tuple((name, types[name]) for name in names if name not in absent),
        constants=(
            *((name, None) for name in names if name in absent),
            *((name, values[name]) for name in _CONSTANTS[function]),
        ),
        num_warps=_WARPS[function],
        pdl=architecture >= 90,
    )


def _scratch(sampler: Sampler) -> dict[str, Scratch]:
    chunks = sampler.num_chunks
    elements = {
        "chunk_peaks": 2 * chunks,
        "chunk_sums": chunks,
        "chunk_tokens": chunks,
        "row_state": _ROW_STATE,
        "weights": chunks * _CHUNK + _CAPACITY,
        "level_counts": _LEVELS * chunks,
        "level_sums": _LEVELS * chunks,
        "candidates": _CAPACITY,
        "chunk_tops": sampler.top * chunks,
        "chunk_top_tokens": sampler.top * chunks,
    }
    scratch = {name: Scratch(["*", "rows", 4 * count]) for name, count in elements.items()}
    return scratch | {"arrivals": Scratch(["*", "rows", 4], zeroed=True)}
