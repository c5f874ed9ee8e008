"""linear on NVIDIA GPUs: which kernel does a product, in which tiles, for which number of rows.

The numbers that a run on a GPU would change are in tuning.json: under "<type>/sm<arch>/<weight rows>x<k>", else
"<type>/sm<arch>", else "<type>", the tiles of one product by the number of its rows; under "invariant/<type>/sm<arch>",
else "invariant/<type>", the one tile of products that must not depend on it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ...engines.expressions import Expression
from ...engines.fields import LARGEST
from ...engines.plan import Range
from ..launches import Constant, Kernel, Launch, Scratch

PADDING = 128

# Of a thread: beside 64 sums and what else an epilogue needs, more would spill.
_EPILOGUE_VALUES = 64
_ALL_REGISTERS = 255
# Columns of an epilogue that takes the place of another.
_LEAST_COLUMNS = 16

_TYPES = {"bf16": "bf16", "fp8": "fp8e4nv", "int8": "i8"}
_BYTES = {"bf16": 2, "fp8": 1, "int8": 1}
_OUT_TYPES = {"bf16": "bf16", "f32": "fp32"}


@dataclass(frozen=True)
class Linear:
    """A product and what is done with it.

    n           outputs: of a gated activation half as many as the weight has rows
    k           columns of the weight
    dtype       of weights and activations: "bf16", "fp8" or "int8"; the last two have scales for rows and columns
    domain      what its rows are: "tokens" or "rows"
    out_dtype   "bf16" or "f32"
    activation  "none", "silu_gated" or "gelu_tanh_gated"
    softcap     0 where there is none
    prologue    how `a` comes from x: None (it is there), "quantize" or "norm" (and quantize)
    eps         of the norm
    invariant   a row's result must not depend on how many there are: one kernel for any number, and no prologue
    """

    n: int
    k: int
    dtype: str
    domain: str = "tokens"
    out_dtype: str = "bf16"
    activation: str = "none"
    softcap: float = 0.0
    bias: bool = False
    residual: bool = False
    prologue: str | None = None
    eps: float = 0.0
    invariant: bool = False

    @property
    def gated(self) -> bool:
        return self.activation != "none"

    @property
    def weight_rows(self) -> int:
        """Rows of the weight as it is stored, padding included."""
        return _padded(2 * self.n if self.gated else self.n)


@dataclass(frozen=True)
class Tile:
    """How a product is cut, for counts up to `most` (None: all above the others). An invariant one is cut alike for any
    count, but up to `most` the parts of K have programs of their own.

    small     by gemm_small, whose tiles hold all rows
    prologue  so many values of x (rows x columns) it may normalise and quantize itself, in every program; 0: reads a
    rows, columns, depth  of activations, of weights, of both at a time
    group     row tiles that pass the columns of weights together
    ctas      programs for each multiprocessor up to which K is split, if the rows are as few as may be (0: never)
    share     the least bytes of a weight's row that a split leaves a program
    prefetch  bytes of each weight row that are fetched before the kernel's predecessor has ended
    """

    most: int | None
    small: bool
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    prologue: int = 0
    group: int = 8
    ctas: int = 0
    share: int = 1024
    prefetch: int = 256


def linear_launches(linear: Linear, arch: int, num_sms: int) -> tuple[Launch, ...]:
    """The launches of a product on compute capability `arch` (90: 9.0), one for every count of rows from 1.

    With a prologue those for few rows (`fused_rows`) read x and norm_weight, the others a and a_scale.
    """
    if linear.invariant:
        return tuple(replace(each, others=_easier(each)) for each in _invariant_launches(linear, arch, num_sms))
    launches = []
    first = 1
    for tile in _tiles(linear, arch):
        guard = Range(linear.domain, first, tile.most or LARGEST)
        launch = _launch(linear, tile, guard, arch, num_sms)
        others = _easier(launch)
        if not tile.small and not launch.scratch:
            narrow = _launch(linear, replace(tile, columns=tile.columns // 2), guard, arch, num_sms)
            others = (*others, narrow, *_easier(narrow))
        launches.append(replace(launch, others=others))
        first = guard.high + 1
    return tuple(launches)


def _easier(launch: Launch) -> tuple[Launch, ...]:
    """What is tried in its place where registers of its epilogue spill: all that a thread can have, fewer columns."""
    kernel, constants = replace(launch.kernel, registers=_ALL_REGISTERS), dict(launch.kernel.constants)
    at_once = int(str(constants["AT_ONCE"]))
    columns = dict.fromkeys((at_once, *(max(at_once // part, min(at_once, _LEAST_COLUMNS)) for part in (2, 4))))
    kernels = (replace(kernel, constants=tuple((constants | {"AT_ONCE": each}).items())) for each in columns)
    return tuple(replace(launch, kernel=each) for each in kernels)


def fused_rows(linear: Linear, arch: int) -> int:
    """Up to how many rows the launches read x; 0: they all read a."""
    if linear.invariant:
        return 0
    return max((tile.most or 0 for tile in _tiles(linear, arch) if tile.prologue), default=0)


def _invariant_launches(linear: Linear, arch: int, num_sms: int) -> tuple[Launch, ...]:
    """One kernel for any count. Few rows have a program for each part of K, many one for all, which adds alike."""
    key = f"invariant/{linear.dtype}"
    (tile,) = _table().get(f"{key}/sm{arch}") or _table()[key]
    few = _launch(linear, tile, Range(linear.domain, 1, tile.most or LARGEST), arch, num_sms)
    if not few.scratch:
        return (replace(few, guard=(Range(linear.domain, 1, LARGEST),)),)
    # The kernel's parameters all the same, of which nothing is touched.
    scratch = {name: replace(memory, bytes=4) for name, memory in few.scratch.items()}
    guard = Range(linear.domain, (tile.most or LARGEST) + 1, LARGEST)
    return few, replace(few, grid=(few.grid[0], 1, 1), guard=(guard,), scratch=scratch)


def _launch(linear: Linear, tile: Tile, guard: Range, arch: int, num_sms: int) -> Launch:
    depth = tile.depth if _padded(linear.k) % tile.depth == 0 else PADDING
    column_tiles = -(-_padded(linear.n) * (2 if linear.gated else 1) // tile.columns)
    row_tiles = -(-guard.low // tile.rows)
    splits = _splits(linear, tile, depth, row_tiles * column_tiles, num_sms)
    operands = _operands(linear, tile, splits)
    constants = _constants(linear, tile, depth, splits, arch >= 90) | {"COLUMN_TILES": column_tiles}
    kernel = Kernel(
        plugin="linear",
        function="gemm_any" if linear.invariant else "gemm_small" if tile.small else "gemm",
        role="gemm",
        parameters=tuple((name, kind) for name, kind in operands.items() if kind is not None),
        constants=(*((name, None) for name, kind in operands.items() if kind is None), *constants.items()),
        num_warps=tile.warps,
        num_stages=tile.stages,
        pdl=arch >= 90,
    )
    scratch = {}
    if splits > 1:
        # Scratch is planned for the largest step, of which this launch sees guard.high rows at most.
        most = _grid_tiles(tile, ["min", linear.domain, guard.high], column_tiles)
        scratch["partials"] = Scratch(["*", most, splits * tile.rows * tile.columns * 4])
        scratch["counters"] = Scratch(["*", most, 4], zeroed=True)
    return Launch(kernel, (_grid_tiles(tile, linear.domain, column_tiles), splits, 1), (guard,), scratch)


def _grid_tiles(tile: Tile, count: Expression, column_tiles: int) -> Expression:
    return column_tiles if tile.small else ["*", ["ceil_div", count, tile.rows], column_tiles]


def _operands(linear: Linear, tile: Tile, splits: int) -> dict[str, str | None]:
    """The kernel's parameters in the order of the source, with their types; None where one is absent."""
    kind, scaled = f"*{_TYPES[linear.dtype]}", linear.dtype != "bf16"
    operands = {"a": None if tile.prologue else kind, "a_scale": "*fp32" if scaled and not tile.prologue else None}
    if tile.small:
        operands["x"] = "*bf16" if tile.prologue else None
        operands["norm_weight"] = "*fp32" if tile.prologue and linear.prologue == "norm" else None
    return {
        **operands,
        "weight": kind,
        "weight_scale": "*fp32" if scaled else None,
        "bias": "*fp32" if linear.bias else None,
        "residual": "*bf16" if linear.residual else None,
        "out": f"*{_OUT_TYPES[linear.out_dtype]}",
        "partials": None if splits == 1 else "*i32" if linear.dtype == "int8" else "*fp32",
        "counters": None if splits == 1 else "*i32",
        "count": "i32",
    }


def _constants(linear: Linear, tile: Tile, depth: int, splits: int, pdl: bool) -> dict[str, Constant]:
    share = -(-_padded(linear.k) // depth // splits) * depth
    least = (_padded(linear.k) - share * (splits - 1)) * _BYTES[linear.dtype]
    constants: dict[str, Constant] = {
        "N": linear.weight_rows,
        "K": _padded(linear.k),
        "OUT_COLUMNS": linear.n,
        "OUT_STRIDE": _padded(linear.n),
        "ACTIVATION": linear.activation,
        "SOFTCAP": linear.softcap,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": depth,
        "AT_ONCE": _columns_at_once(tile, splits),
        "SHARE": share,
        "SPLITS": splits,
        # A power of two; the last split may have less than the others, and nothing lies behind the weight's end.
        "PREFETCH": 1 << min(tile.prefetch, least).bit_length() - 1,
        # None: fp8 on sm_90 sums in the tensor core's own precision, as cuBLASLt's fast accumulation does.
        "IMPRECISE": None,
        "PDL": pdl,
    }
    if not tile.small:
        return {**constants, "GROUP": tile.group}
    x_rows = (tile.most or tile.rows) if tile.prologue else 0
    return {**constants, "X_COLUMNS": linear.k, "X_ROWS": x_rows, "EPS": linear.eps}


def _columns_at_once(tile: Tile, splits: int) -> int:
    """Columns that an epilogue has in registers beside the sums, with all parts of a split product; a power of two."""
    threads = 32 * tile.warps
    sums = tile.rows * tile.columns // threads
    if splits == 1:
        values = min(_EPILOGUE_VALUES, _EPILOGUE_VALUES**2 // sums)
    else:  # tiles of more rows have the multiprocessor's registers for themselves, and fewer rounds save time
        values = max(_EPILOGUE_VALUES, tile.rows)
    columns = values * threads // (tile.rows * splits)
    return min(tile.columns, 1 << columns.bit_length() - 1)


def _splits(linear: Linear, tile: Tile, depth: int, tiles: int, num_sms: int) -> int:
    """Into how many parts K is cut, none of them empty; even ones where they do nearly as well."""
    blocks = _padded(linear.k) // depth
    most = min(blocks, tile.ctas * num_sms // tiles, _padded(linear.k) * _BYTES[linear.dtype] // tile.share)
    even = [splits for splits in range(max(most, 1), most // 2, -1) if blocks % splits == 0]
    return even[0] if even else -(-blocks // -(-blocks // most))


def _tiles(linear: Linear, arch: int) -> tuple[Tile, ...]:
    """Those of the table, without prologues where the product has none or every program would have too much to do."""
    shape = f"{linear.weight_rows}x{_padded(linear.k)}"
    keys = (f"{linear.dtype}/sm{arch}/{shape}", f"{linear.dtype}/sm{arch}", linear.dtype)
    tiles = next(_table()[key] for key in keys if key in _table())
    # What is bf16 already needs no quantization: x is a.
    wanted = linear.prologue == "norm" or (linear.prologue == "quantize" and linear.dtype != "bf16")
    return tuple(
        tile for tile in tiles if not tile.prologue or (wanted and (tile.most or 0) * linear.k <= tile.prologue)
    )


@cache
def _table() -> dict[str, tuple[Tile, ...]]:
    table = json.loads(Path(__file__).with_name("tuning.json").read_text(encoding="utf-8"))
    return {key: tuple(Tile(**tile) for tile in tiles) for key, tiles in table.items()}


def _padded(columns: int) -> int:
    return -(-columns // PADDING) * PADDING
