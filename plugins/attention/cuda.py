"""The kernels of attention on CUDA: which there are for a shape, a type and an architecture, and when each is used.

The numbers that a run on a GPU would change are in tuning.json: under "<class>/<type>/sm<arch>/<shape>", else under
less of it, down to "<class>"; shape: <heads>x<KV heads>x<head size>. The classes are

decode/<row>/<group>  row: bytes of a head's keys of one token, up to "128B", "256B" or "512B"; group: how many heads
                      share a KV head, up to 32 "few", up to 64 "some", else "many"
prefill/<heads>       "whole" ones are rotated from end to end, "part" in part, or padded to a power of two; those of
                      more than 128 elements are "wide-whole" or "wide-part"
attend_any/<heads>    of the one kernel of batch-invariant builds: "narrow" or "wide"
splits                of decode, by how many pairs of queries and KV heads there are

Tiles are the largest that no register spills from, for most heads of their class; others get the first of `_smaller`
ones that none does. A decoding program has 32 KiB of keys and values in one and two of them in flight: two or three
programs share an SM, one 99 KiB. With wide heads and 8 bits sm90's wgmma, which takes 64 rows, has registers to convert
what it multiplies only if the queries are in shared memory. attend_any keeps two sums, of a span and of those before:
of wide heads on sm100, and with 8 bits on sm90, two programs take half of the values each, and all keys; where mma.sync
multiplies they have 32 rows. Its tiles have no more than 64 keys, as they begin at multiples, where a window's block
may too. Splits are enough programs to fill 132 SMs several times over, and none of less work than its part of the
combining costs; large batches are split for their long sequences alone, which would run on when all others have ended.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from ...engines.expressions import Expression
from ...engines.fields import LARGEST
from ...engines.plan import Range
from ..kv_write.cuda import BLOCK_TOKENS, ELEMENT_BYTES, StateLayout, padded_width
from ..launches import Constant, Kernel, Launch, Scratch, in_order_of_preference

TILE_TOKENS = 128
"""Most tokens of an entry of the step input `tiles`, in every engine."""


@dataclass(frozen=True)
class Attention:
    """An operator `attention`. q_offset, stride: elements, in the rows that hold q. window 0: none; softcap 0: none.

    invariant: a token's result must not depend on what else is in the step: one kernel for decode and for prefill
    """

    layout: StateLayout
    num_heads: int
    q_offset: int
    stride: int
    rot_dim: int
    eps: float
    scale: float
    softcap: float
    window: int
    has_norm: bool
    invariant: bool = False


@dataclass(frozen=True)
class Tiles:
    """How a kernel walks. rows: tokens of a program (decode: 0); keys: of a tile; in_shared: a program keeps its
    queries in shared memory, not in registers; slices: programs of attend_any that share a head's values."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    in_shared: bool = False
    slices: int = 1


@dataclass(frozen=True)
class Split:
    """Up to `pairs` of queries and KV heads (None: all above the others) the keys are split over `splits` programs, of
    `least_keys` or more each."""

    pairs: int | None
    splits: int
    least_keys: int


# Of a thread.
_ALL_REGISTERS = 255
# Of tiles that take the place of others.
_LEAST_ROWS, _LEAST_KEYS, _MOST_WARPS = 16, 32, 8
# Of many heads that share a KV head, decoded by one program, and where fewer rows would not be multiplied as wanted.
_LEAST_KEYS_OF_FEW = 16
# Keys whose results are found by themselves, and then taken together; a decoding token can have a program for each.
SPAN = 256
# Up to so many pairs of tokens and KV heads; more fill a GPU without.
SPAN_PAIRS = 64


def tuning_keys(what: str, operator: Attention, architecture: int) -> tuple[str, ...]:
    """Under which the table may have the tiles of a kernel ("decode", "prefill", "attend_any") or the "splits" of
    decode; the first that it has is the one."""
    layout = operator.layout
    kind = f"{_shape_class(what, operator)}/{layout.kv_dtype}"
    shape = f"{operator.num_heads}x{layout.num_kv_heads}x{layout.head_dim}"
    return f"{kind}/sm{architecture}/{shape}", f"{kind}/sm{architecture}", kind, _shape_class(what, operator)


def _shape_class(what: str, operator: Attention) -> str:
    layout, group = operator.layout, operator.num_heads // operator.layout.num_kv_heads
    width = padded_width(layout.head_dim)
    if what == "splits":
        return what
    if what == "decode":
        row_bytes = width * ELEMENT_BYTES[layout.kv_dtype]
        rows = "128B" if row_bytes <= 128 else "256B" if row_bytes <= 256 else "512B"
        return f"{what}/{rows}/{'few' if group <= 32 else 'some' if group <= 64 else 'many'}"
    if what == "attend_any":
        return f"{what}/{'wide' if width > 128 else 'narrow'}"
    return f"{what}/{'wide-' if width > 128 else ''}{'whole' if operator.rot_dim == width else 'part'}"


def _tiles(what: str, operator: Attention, architecture: int) -> Tiles:
    (entry,) = _entries(what, operator, architecture)
    return Tiles(**entry)


def _splits(operator: Attention, architecture: int) -> tuple[Split, ...]:
    return tuple(Split(**entry) for entry in _entries("splits", operator, architecture))


def _entries(what: str, operator: Attention, architecture: int) -> list[dict[str, Any]]:
    table = _table()
    return next(table[key] for key in tuning_keys(what, operator, architecture) if key in table)


@cache
def _table() -> dict[str, list[dict[str, Any]]]:
    table: dict[str, list[dict[str, Any]]] = json.loads(
        Path(__file__).with_name("tuning.json").read_text(encoding="utf-8")
    )
    return table


def attention_launches(operator: Attention, architecture: int, domain: str, pdl: bool) -> tuple[Launch, ...]:
    """domain "tokens": decode for the step's `decodes`, prefill for its `tiles`; "rows": every row decodes."""

    def made(what: str, make: Callable[[Tiles], tuple[Launch, ...]]) -> tuple[Launch, ...]:
        ways = map(make, _smaller(_tiles(what, operator, architecture)))
        return in_order_of_preference([each for way in ways for each in (way, _with_all_registers(way))])

    if operator.invariant:
        return made("attend_any", lambda tiles: _invariant(operator, tiles, domain, pdl))
    splits, variable = _splits(operator, architecture), "rows" if domain == "rows" else "decodes"
    decode = made("decode", lambda tiles: _decode(operator, tiles, splits, variable, pdl))
    return decode if domain == "rows" else (*decode, *made("prefill", lambda tiles: _prefill(operator, tiles, pdl)))


def _smaller(tiles: Tiles) -> Iterator[Tiles]:
    """The table's, and what is tried in their place, one after the other, for heads from which those spill."""
    rows = [size for size in (tiles.rows, tiles.rows // 2, tiles.rows // 4) if size >= _LEAST_ROWS] or [0]
    least = _LEAST_KEYS if tiles.rows and not tiles.in_shared and tiles.slices == 1 else _LEAST_KEYS_OF_FEW
    halvings = 2 if least < _LEAST_KEYS else 1
    keys = [tiles.keys >> halving for halving in range(halvings + 1) if tiles.keys >> halving >= least]
    warps = [tiles.num_warps] if tiles.rows else dict.fromkeys((tiles.num_warps, _MOST_WARPS))
    return (Tiles(*size, tiles.num_stages, tiles.in_shared, tiles.slices) for size in product(rows, keys, warps))


def _with_all_registers(launches: tuple[Launch, ...]) -> tuple[Launch, ...]:
    """By itself ptxas spills some, so that more programs run at a time; told so, it does now and then elsewhere."""
    return tuple(replace(each, kernel=replace(each.kernel, registers=_ALL_REGISTERS)) for each in launches)


def _decode(
    operator: Attention, tiles: Tiles, splits: tuple[Split, ...], variable: str, pdl: bool
) -> tuple[Launch, ...]:
    layout, group = operator.layout, operator.num_heads // operator.layout.num_kv_heads
    queries, other = ("rows", "decode_tokens") if variable == "rows" else ("decode_tokens", "rows")
    kernel = _kernel(
        operator,
        "decode",
        ((queries, "*i32"), ("out", "*bf16"), ("partials", "*fp32"), ("partial_sums", "*fp32"), ("arrivals", "*i32")),
        (("least_tiles", "i32"),),
        {other: None, "GROUP_ROWS": padded_width(group), "TILE": tiles.keys},
        tiles,
        pdl,
    )
    launches, low = [], 1
    for split in splits:
        high = LARGEST if split.pairs is None else split.pairs // layout.num_kv_heads
        if high < low:
            continue
        # One split writes no partial results, however many queries there are.
        pairs: Expression = ["*", variable, layout.num_kv_heads] if split.splits > 1 else 1
        launches.append(
            Launch(
                kernel,
                (variable, layout.num_kv_heads, split.splits),
                (Range(variable, low, high),),
                {
                    "partials": Scratch(["*", pairs, split.splits * group * layout.head_dim * 4]),
                    "partial_sums": Scratch(["*", pairs, split.splits * 2 * group * 4]),
                    "arrivals": Scratch(["*", pairs, 4], zeroed=True),
                },
                {"least_tiles": -(-split.least_keys // tiles.keys)},
            )
        )
        low = high + 1
    return tuple(launches)


def _prefill(operator: Attention, tiles: Tiles, pdl: bool) -> tuple[Launch, ...]:
    constants: dict[str, Constant] = {"ROWS": tiles.rows, "ROWS_OF_A_TILE": TILE_TOKENS, "TILE": tiles.keys}
    constants["IN_SHARED"] = tiles.in_shared
    kernel = _kernel(operator, "prefill", (("tiles", "*i32"), ("out", "*bf16")), (), constants, tiles, pdl)
    grid: Expression = ["*", "tiles", TILE_TOKENS // tiles.rows]
    return (Launch(kernel, (operator.num_heads, grid, 1), (Range("tiles", 1, LARGEST),)),)


def _invariant(operator: Attention, tiles: Tiles, domain: str, pdl: bool) -> tuple[Launch, ...]:
    """One kernel: few decoding tokens have a program for each span of keys, more and tiles one for all spans."""
    layout, group = operator.layout, operator.num_heads // operator.layout.num_kv_heads
    group_rows = min(1 << (group - 1).bit_length(), tiles.rows)
    constants: dict[str, Constant] = {"GROUP_ROWS": group_rows, "ROWS": tiles.rows, "ROWS_OF_A_TILE": TILE_TOKENS}
    constants |= {"TILE": tiles.keys, "SLICES": tiles.slices, "IN_SHARED": tiles.in_shared}
    kernel = _kernel(
        operator,
        "attend_any",
        (("items", "*i32"), ("out", "*bf16"), ("partials", "*fp32"), ("partial_sums", "*fp32"), ("arrivals", "*i32")),
        (("single", "i32"),),
        constants | {"SPAN": SPAN, "PACKED": domain == "rows"},
        tiles,
        pdl,
    )
    kernel = replace(kernel, registers=_ALL_REGISTERS)
    head_parts = layout.num_kv_heads * -(-group // group_rows) * tiles.slices
    columns = min(layout.head_dim, padded_width(layout.head_dim) // tiles.slices)

    def launch(items: Expression, spans: Expression, queries: str, guard: Range) -> Launch:
        # Programs of all spans leave nothing for others, but have the parameters.
        pairs: Expression = 1 if spans == 1 else ["*", items, head_parts]
        each: Expression = ["*", pairs, spans]
        scratch = {
            "partials": Scratch(["*", each, group_rows * columns * 4]),
            "partial_sums": Scratch(["*", each, 2 * group_rows * 4]),
            "arrivals": Scratch(["*", pairs, 4], zeroed=True),
        }
        values: dict[str, int | float] = {"single": int(queries != "tiles")}
        return Launch(kernel, (items, head_parts, spans), (guard,), scratch, values, {"items": queries})

    variable, queries = ("rows", "rows") if domain == "rows" else ("decodes", "decode_tokens")
    high = max(SPAN_PAIRS // head_parts, 1)
    few = launch(variable, _most_spans(operator.window), queries, Range(variable, 1, high))
    more = launch(variable, 1, queries, Range(variable, high + 1, LARGEST))
    if domain == "rows":
        return few, more
    parts = TILE_TOKENS * group_rows // tiles.rows
    return few, more, launch(["*", "tiles", parts], 1, "tiles", Range("tiles", 1, LARGEST))


def _most_spans(window: int) -> Expression:
    """That a token sees keys in."""
    spans: Expression = ["ceil_div", "max_blocks", SPAN // BLOCK_TOKENS]
    return ["min", spans, (window + BLOCK_TOKENS) // SPAN + 2] if window else spans


def _kernel(
    operator: Attention,
    function: str,
    pointers: tuple[tuple[str, str], ...],
    scalars: tuple[tuple[str, str], ...],
    constants: dict[str, Constant],
    tiles: Tiles,
    pdl: bool,
) -> Kernel:
    """What decode and prefill share; `pointers` and `scalars` come after the parameters that both have."""
    layout = operator.layout
    constants = constants | layout.constants()
    constants |= {
        "GROUP": operator.num_heads // layout.num_kv_heads,
        "ROT_DIM": operator.rot_dim,
        "EPS": operator.eps,
        "SCALE": operator.scale,
        "SOFTCAP": operator.softcap,
        "WINDOW": operator.window,
        "Q_OFFSET": operator.q_offset,
        "STRIDE": operator.stride,
        "PDL": pdl,
    }
    norm: tuple[tuple[str, str], ...] = (("q_norm", "*fp32"),)
    if not operator.has_norm:
        norm, constants["q_norm"] = (), None
    return Kernel(
        plugin="attention",
        function=function,
        role="attention",
        parameters=(
            ("q", "*bf16"),
            ("cos", "*fp32"),
            ("sin", "*fp32"),
            *norm,
            *layout.parameters(),
            ("block_table", "*i32"),
            ("positions", "*i32"),
            ("token_sequence", "*i32"),
            *pointers,
            ("max_blocks", "i32"),
            *scalars,
        ),
        constants=tuple(sorted(constants.items())),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        pdl=pdl,
    )
