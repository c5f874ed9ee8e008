"""The kernels of attention on CUDA: which there are for a shape, a type and an architecture, and when each is used."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...engines.expressions import Expression
from ...engines.fields import LARGEST
from ...engines.plan import Range
from ..kv_write.cuda import BLOCK_TOKENS, ELEMENT_BYTES, StateLayout, padded_width
from ..launches import Constant, Kernel, Launch, Scratch

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
    """How a kernel walks. rows: tokens of a prefill program (decode: 0); keys: of a tile."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Split:
    """Up to `pairs` of queries and KV heads the keys are split over `splits` programs, of `least_keys` or more each."""

    pairs: int
    splits: int
    least_keys: int


# Enough programs to fill 132 SMs several times over, and none of less work than its part of the combining costs. Large
# batches are split for their long sequences alone, which would run on when all others have ended.
SPLITS = (
    Split(32, 32, 128),
    Split(64, 16, 128),
    Split(128, 8, 128),
    Split(256, 4, 256),
    Split(512, 4, 512),
    Split(1024, 4, 1024),
    Split(LARGEST, 1, 64),
)


# By how heads are rotated ("whole", or in part or padded to a power of two; "wide": more than 128 elements), the
# cache's type and the architecture, 0 for all others. With wide heads and 8 bits sm90's wgmma leaves too few registers
# to convert what it multiplies: less than 64 rows are for mma.sync.
PREFILL = {
    ("whole", "bf16", 0): Tiles(128, 64, 8, 2),
    ("whole", "bf16", 90): Tiles(128, 128, 8, 2),
    ("whole", "8 bits", 0): Tiles(128, 64, 8, 2),
    ("part", "bf16", 0): Tiles(128, 64, 8, 2),
    ("part", "bf16", 90): Tiles(128, 128, 8, 2),
    ("part", "8 bits", 0): Tiles(64, 64, 8, 2),
    ("part", "8 bits", 90): Tiles(128, 64, 8, 2),
    ("part", "8 bits", 100): Tiles(128, 64, 8, 2),
    ("wide", "bf16", 0): Tiles(64, 32, 8, 2),
    ("wide", "bf16", 90): Tiles(128, 64, 8, 2),
    ("wide", "bf16", 100): Tiles(128, 64, 8, 2),
    ("wide", "8 bits", 0): Tiles(64, 64, 8, 2),
    ("wide", "8 bits", 90): Tiles(32, 64, 4, 2),
    ("wide", "8 bits", 100): Tiles(64, 32, 8, 2),
}

# Of a thread.
_ALL_REGISTERS = 255
# Keys whose results are found by themselves, and then taken together; a decoding token can have a program for each.
SPAN = 256
# Up to so many pairs of tokens and KV heads; more fill a GPU without.
SPAN_PAIRS = 64
# Of the one kernel that keeps two sums, of a span and of those before: by whether heads are wide, and the architecture,
# 0 for all others. With wide heads, wgmma's and tcgen05's 64 rows leave too few registers: 32 are for mma.sync.
INVARIANT = {
    ("narrow", 0): Tiles(32, 64, 4, 2),
    ("narrow", 90): Tiles(64, 64, 8, 2),
    ("narrow", 100): Tiles(64, 64, 8, 2),
    ("wide", 0): Tiles(32, 32, 8, 2),
}


def decode_tiles(layout: StateLayout, group: int) -> Tiles:
    """32 KiB of keys and values in a tile, two tiles in flight: two or three programs share an SM, one 99 KiB."""
    row_bytes = padded_width(layout.head_dim) * ELEMENT_BYTES[layout.kv_dtype]
    if group > 32:
        return Tiles(0, 64 if row_bytes <= 256 and group <= 64 else 32, 8, 3)
    return Tiles(0, 128 if row_bytes <= 128 else 64 if row_bytes <= 256 else 32, 4, 3)


def prefill_tiles(layout: StateLayout, rot_dim: int, architecture: int) -> Tiles:
    """The largest tiles that no register spills from."""
    width = padded_width(layout.head_dim)
    heads = "wide" if width > 128 else "whole" if rot_dim == width else "part"
    default = PREFILL[heads, _kind(layout), 0]
    return PREFILL.get((heads, _kind(layout), architecture), default)


def invariant_tiles(layout: StateLayout, architecture: int) -> Tiles:
    """As prefill_tiles, but no tile has more than 64 keys: they begin at multiples, where a window's block may too."""
    heads = "wide" if padded_width(layout.head_dim) > 128 else "narrow"
    return INVARIANT.get((heads, architecture), INVARIANT[heads, 0])


def _kind(layout: StateLayout) -> str:
    return "bf16" if layout.kv_dtype == "bf16" else "8 bits"


def attention_launches(operator: Attention, architecture: int, domain: str, pdl: bool) -> tuple[Launch, ...]:
    """domain "tokens": decode for the step's `decodes`, prefill for its `tiles`; "rows": every row decodes."""
    if operator.invariant:
        return _invariant(operator, architecture, domain, pdl)
    if domain == "rows":
        return _decode(operator, architecture, "rows", pdl)
    return (*_decode(operator, architecture, "decodes", pdl), _prefill(operator, architecture, pdl))


def _decode(operator: Attention, architecture: int, variable: str, pdl: bool) -> tuple[Launch, ...]:
    layout, group = operator.layout, operator.num_heads // operator.layout.num_kv_heads
    tiles = decode_tiles(layout, group)
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
    for split in SPLITS:
        high = max(split.pairs // layout.num_kv_heads, 0) if split.pairs < LARGEST else LARGEST
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


def _prefill(operator: Attention, architecture: int, pdl: bool) -> Launch:
    tiles = prefill_tiles(operator.layout, operator.rot_dim, architecture)
    constants: dict[str, Constant] = {"ROWS": tiles.rows, "ROWS_OF_A_TILE": TILE_TOKENS, "TILE": tiles.keys}
    kernel = _kernel(operator, "prefill", (("tiles", "*i32"), ("out", "*bf16")), (), constants, tiles, pdl)
    grid: Expression = ["*", "tiles", TILE_TOKENS // tiles.rows]
    return Launch(kernel, (operator.num_heads, grid, 1), (Range("tiles", 1, LARGEST),))


def _invariant(operator: Attention, architecture: int, domain: str, pdl: bool) -> tuple[Launch, ...]:
    """One kernel: few decoding tokens have a program for each span of keys, more and tiles one for all spans."""
    layout, group = operator.layout, operator.num_heads // operator.layout.num_kv_heads
    tiles = invariant_tiles(layout, architecture)
    group_rows = min(1 << (group - 1).bit_length(), tiles.rows)
    constants: dict[str, Constant] = {"GROUP_ROWS": group_rows, "ROWS": tiles.rows, "ROWS_OF_A_TILE": TILE_TOKENS}
    kernel = _kernel(
        operator,
        "attend_any",
        (("items", "*i32"), ("out", "*bf16"), ("partials", "*fp32"), ("partial_sums", "*fp32"), ("arrivals", "*i32")),
        (("single", "i32"),),
        constants | {"TILE": tiles.keys, "SPAN": SPAN, "PACKED": domain == "rows"},
        tiles,
        pdl,
    )
    kernel = replace(kernel, registers=_ALL_REGISTERS)
    head_parts = layout.num_kv_heads * -(-group // group_rows)

    def launch(items: Expression, spans: Expression, queries: str, guard: Range) -> Launch:
        # Programs of all spans leave nothing for others, but have the parameters.
        pairs: Expression = 1 if spans == 1 else ["*", items, head_parts]
        each: Expression = ["*", pairs, spans]
        scratch = {
            "partials": Scratch(["*", each, group_rows * layout.head_dim * 4]),
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
