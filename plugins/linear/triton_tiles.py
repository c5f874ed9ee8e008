"""Where a product's programs find their tile: of the rows, of the weights, of the depth."""

import triton
import triton.language as tl


@triton.jit
def grouped(program, row_tiles, COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr):
    """Program -> (row tile, column tile): GROUP row tiles pass the columns together, so that L2 serves them all."""
    first = program // (GROUP * COLUMN_TILES) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    place = program % (GROUP * COLUMN_TILES)
    return first + place % height, place // height


@triton.jit
def weight_tile(
    weight,
    column_tile,
    N: tl.constexpr,
    K: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Pointers [COLUMNS, DEPTH] to the tile's weights; what lies behind the last row is a copy of it."""
    columns = tl.arange(0, COLUMNS)
    if COLUMN_TILES * COLUMNS > N:
        columns = tl.minimum(columns, N - 1 - column_tile * COLUMNS)
    # A tile that lies behind altogether has negative columns, back to the last row.
    return weight + (column_tile * COLUMNS).to(tl.int64) * K + columns[:, None] * K + tl.arange(0, DEPTH)[None, :]


@triton.jit
def share_of_depth(K: tl.constexpr, SHARE: tl.constexpr):
    """The columns of the weights that are this program's: no constants, with which LLVM would unroll the loop."""
    begin = tl.program_id(1) * SHARE
    end = begin + SHARE
    if K % SHARE != 0:
        end = tl.minimum(end, K)
    return begin, end


@triton.jit
def prefetch(
    weight,
    column_tile,
    N: tl.constexpr,
    K: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Brings the first PREFETCH bytes of the tile's rows into the L2 cache, line by line."""
    LINE: tl.constexpr = 128 * 8 // weight.dtype.element_ty.primitive_bitwidth
    lines = weight_tile(weight, column_tile, N, K, COLUMN_TILES, COLUMNS, 1) + tl.arange(0, PREFETCH // 128) * LINE
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )
