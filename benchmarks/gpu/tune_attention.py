"""Chooses tiles and splits of attention for a model's heads on this GPU; writes them to plugins/attention/tuning.json.

Entry after entry is searched, each with those that were found before it: the tiles of decode, its splits by the number
of queries, the tiles of prefill. Every choice is measured in the scenes that the table's own is measured in. Left out
are tiles that cannot be compiled, that spill, that want more shared memory than there is or other instructions than the
table's, for these heads or for such with a norm, a soft-cap and a window; and all that computes something else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from enginery.engines.plan import KernelImage
from enginery.plugins.attention import cuda
from enginery.plugins.attention.cuda import Attention, Split, Tiles
from enginery.plugins.launches import Kernel

from tests.gpu.launcher import compiled, prepare, target
from tests.gpu.paged import Heads, Scene, make_launches, make_operator

from . import tuning_table
from .attention import heads_of
from .results import Cell, Results
from .roofs import Shape
from .timing import copies, graph_seconds
from .tuning_table import ATTENTION, Table

PART = "tune-attention"
Entry = Tiles | Split
# A sequence's length, and how many of its last tokens ask.
Contexts = tuple[tuple[int, int], ...]
_LEAST_GAIN = 1.02
# Of a row: in units of its largest value.
_SAME = 0.02
_LENGTHS = (1024, 4096)
_SPLITS = (1, 2, 4, 8, 16, 32, 64)
_LEAST_KEYS = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Question:
    """An entry of the table, for heads of a shape.

    what     as cuda.tuning_keys calls it
    place    the entry's, in the list that the table has
    choices  what it may be, the table's own first
    scenes   of which steps the geometric mean of times counts
    """

    name: str
    what: str
    place: int
    choices: tuple[Entry, ...]
    scenes: tuple[Contexts, ...]


def run(results: Results, shape: Shape, kv_dtype: str, directory: Path, deadline_s: float) -> None:
    """A cell for each entry: its time and that of the best one. What is better is in the table at once."""
    results.begin(PART)
    heads, deadline, table = heads_of(shape), time.monotonic() + deadline_s, tuning_table.read(ATTENTION)
    operator = make_operator(heads, kv_dtype)
    for question in questions(operator):
        with results.attempt(PART, question.name):
            found = measure(question, operator, heads, table, deadline)
            if not found:
                print(f"{PART}: {question.name}: the time was over, or nothing could be measured", flush=True)
                continue
            old, best = question.choices[0], best_of(question, found)
            if best != old:
                table = put(table, question, operator, best)
                (directory / "tuning.attention.json").write_text(tuning_table.write(ATTENTION, table))
            microseconds = {str(choice): seconds * 1e6 for choice, seconds in found.items()}
            results.note(PART, **{f"{kv_dtype} {question.name}": microseconds})
            name, ratio = f"{kv_dtype} {question.name}: {best}", found[old] / found[best]
            results.add(Cell(PART, name, found[best] * 1e6, "us", found[old] * 1e6, "the table", ratio))
        torch.cuda.empty_cache()


def questions(operator: Attention) -> Iterator[Question]:
    """In the order in which they are to be answered."""
    kv_heads, arch = operator.layout.num_kv_heads, target().arch
    decodes = tuple(((length, 1),) * batch for batch, length in ((1, 8192), (16, 1024), (64, 1024), (64, 4096)))
    yield Question("tiles of decode", "decode", 0, tiles_of("decode", operator, arch), decodes)
    before = 0
    for place, split in enumerate(cuda._splits(operator, arch)):
        # Of the last range, which has no end: twice as many as the one before has.
        batch = (2 * before if split.pairs is None else split.pairs) // kv_heads
        before = split.pairs or before
        if batch > 0:
            name = f"splits of decode, {'more' if split.pairs is None else split.pairs} pairs"
            scenes = tuple(((length, 1),) * batch for length in _LENGTHS)
            yield Question(name, "splits", place, splits_of(split), scenes)
    yield Question("tiles of prefill", "prefill", 0, tiles_of("prefill", operator, arch), (((4096, 4096),),))


def tiles_of(what: str, operator: Attention, arch: int) -> tuple[Tiles, ...]:
    """The table's, and others."""
    decode, usual = what == "decode", cuda._tiles(what, operator, arch)
    others = [
        Tiles(rows, keys, warps, stages, in_shared)
        for rows in ((0,) if decode else (64, 128))
        for keys in (32, 64, 128)
        for warps in (4, 8)
        for stages in ((2, 3, 4) if decode else (2, 3))
        for in_shared in ((False, True) if what == "prefill" else (False,))
    ]
    return tuple(dict.fromkeys((usual, *others)))


def splits_of(usual: Split) -> tuple[Split, ...]:
    """The table's, and others for as many pairs; what a single one has at least is all the same."""
    others = [
        Split(usual.pairs, splits, least)
        for splits in _SPLITS
        for least in (_LEAST_KEYS if splits > 1 else _LEAST_KEYS[:1])
    ]
    return tuple(dict.fromkeys((usual, *others)))


def measure(question: Question, operator: Attention, heads: Heads, table: Table, deadline: float) -> dict[Entry, float]:
    """Seconds of every choice that is usable, in the geometric mean over the scenes; empty where the time was over."""
    kv_dtype, scenes = operator.layout.kv_dtype, [(each, layers_of(operator, each)) for each in question.scenes]
    operators = [make_operator(heads, kv_dtype, layers) for layers in dict.fromkeys(layers for _, layers in scenes)]
    logarithms = dict.fromkeys(usable(question, operators, table), 0.0)
    for contexts, layers in scenes:
        scene, wanted = Scene(kv_dtype, heads, contexts, layers), None
        for choice in list(logarithms):
            if time.monotonic() > deadline:
                return {}
            with tuned(put(table, question, operator, choice)):
                found = scene.run()
                wanted = found if wanted is None else wanted
                if bool(((found - wanted).abs() <= _SAME * wanted.abs().amax(1, keepdim=True)).all()):
                    logarithms[choice] += math.log(seconds(scene, layers)) / len(scenes)
                else:
                    print(f"{PART}: {question.name}: {choice} gives something else", flush=True)
                    del logarithms[choice]
    return {choice: math.exp(logarithm) for choice, logarithm in logarithms.items()}


def best_of(question: Question, found: dict[Entry, float]) -> Entry:
    """The table's own, where no other is faster by more than measuring again would be."""
    best = min(found, key=lambda choice: found[choice])
    return best if found[best] * _LEAST_GAIN <= found[question.choices[0]] else question.choices[0]


def put(table: Table, question: Question, operator: Attention, choice: Entry) -> Table:
    """The table with this choice, for these heads on this GPU alone."""
    keys = cuda.tuning_keys(question.what, operator, target().arch)
    entries = list(next(table[key] for key in keys if key in table))
    entries[question.place] = tuning_table.as_entry(choice)
    return table | {keys[0]: entries}


@contextmanager
def tuned(table: Table) -> Iterator[None]:
    """Launches are those of this table."""
    usual = cuda._table
    cuda._table = lambda: table  # type: ignore[assignment]
    try:
        yield
    finally:
        cuda._table = usual


def usable(question: Question, operators: Sequence[Attention], table: Table) -> list[Entry]:
    """The choices whose kernels are as they must be, the table's own among them."""
    first, function = operators[0], "decode" if question.what == "splits" else question.what
    like = (replace(first, has_norm=True), replace(first, softcap=50.0, window=777))
    kernels: dict[Entry, list[Kernel]] = {}
    for choice in question.choices:
        with tuned(put(table, question, first, choice)):
            launches = [launch for each in (*operators, *like) for launch in make_launches(each)]
            wanted = (launch.kernel for launch in launches if launch.kernel.function == function)
            kernels[choice] = list(dict.fromkeys(wanted))
    refused = set(prepare(list(dict.fromkeys(kernel for each in kernels.values() for kernel in each))))
    usual = question.choices[0]
    instruction = compiled(kernels[usual][0]).image.instruction

    def holds(choice: Entry) -> bool:
        return all(each not in refused and fits(compiled(each).image, instruction) for each in kernels[choice])

    return [usual, *(choice for choice in question.choices[1:] if holds(choice))]


def fits(image: KernelImage, instruction: str) -> bool:
    """Whether the machine code is as it must be."""
    return not image.spill_bytes and image.shared_bytes <= target().shared_bytes and image.instruction == instruction


def layers_of(operator: Attention, contexts: Contexts) -> int:
    """As many as must be read in turn so that none is in the L2 cache; a power of two, being a constant of kernels."""
    if contexts[0][1] > 1:
        return 1
    row_bytes = operator.layout.num_kv_heads * operator.layout.head_dim * cuda.ELEMENT_BYTES[operator.layout.kv_dtype]
    return 1 << (copies(2 * row_bytes * sum(length for length, _ in contexts), 32) - 1).bit_length()


def seconds(scene: Scene, layers: int) -> float:
    """Of one layer."""
    scratch: dict[str, torch.Tensor] = {}
    calls = [call for layer in range(layers) for call in scene.calls(layer, scratch)]
    return graph_seconds(calls, least_s=0.005, repeats=3)
