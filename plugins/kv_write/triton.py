"""kv_write on CUDA: norm and rotate keys, then store keys and values in their slots of the paged cache.

A program takes a few heads, whichever tokens they are of: [HEADS, WIDTH], where WIDTH is head_dim or the power of two
above it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def store(
    k,
    v,
    cos,
    sin,
    k_norm,
    slots,
    state,
    state_scales,
    count,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROT_DIM: tl.constexpr,
    EPS: tl.constexpr,
    K_OFFSET: tl.constexpr,
    V_OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """k, v [count, ·] at K_OFFSET and V_OFFSET in rows of STRIDE; state and state_scales are one address, the layer's
    in block 0. BLOCK_STRIDE and HEAD_STRIDE count elements of the state.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    item = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    token, head = item // NUM_KV_HEADS, item % NUM_KV_HEADS
    slot = tl.load(slots + token, mask=token < count, other=-1)
    live = (slot >= 0)[:, None]
    row = (token.to(tl.int64) * STRIDE + head * HEAD_DIM)[:, None]
    table = (token.to(tl.int64) * (ROT_DIM // 2))[:, None]
    keys = prepare_heads(k + K_OFFSET + row, k_norm, cos + table, sin + table, live, HEAD_DIM, WIDTH, ROT_DIM, EPS)
    column = tl.arange(0, WIDTH)[None, :]
    inside = live & (column < HEAD_DIM)
    values = tl.load(v + V_OFFSET + row + column, mask=inside, other=0.0).to(tl.float32)
    block_head = slot // 64 * BLOCK_STRIDE + head * HEAD_STRIDE
    at = state + (block_head + slot % 64 * HEAD_DIM)[:, None] + column
    if state_scales is None:
        tl.store(at, keys.to(state.dtype.element_ty), mask=inside)
        tl.store(at + 64 * HEAD_DIM, values.to(state.dtype.element_ty), mask=inside)
    else:
        # The state's elements are bytes and its scales two each, after all keys and values of the head.
        scale_at = state_scales + block_head // 2 + 64 * HEAD_DIM + slot % 64
        keys, key_scale = _quantize(keys, state.dtype.element_ty)
        values, value_scale = _quantize(values, state.dtype.element_ty)
        turned = state + (block_head + 64 * HEAD_DIM + slot % 64)[:, None] + column * 64
        tl.store(at, keys, mask=inside)
        tl.store(turned, values, mask=inside)
        tl.store(scale_at, key_scale, mask=slot >= 0)
        tl.store(scale_at + 64, value_scale, mask=slot >= 0)


@triton.jit
def prepare_heads(
    heads,
    norm,
    cos,
    sin,
    live,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROT_DIM: tl.constexpr,
    EPS: tl.constexpr,
):
    """Pointers [M, 1] to heads and to their rows of cos and sin -> f32 [M, WIDTH]: each head normed if there is a
    weight, ROT_DIM of it rotated; zeros where `live` [M, 1] is false and from HEAD_DIM on.
    """
    if ROT_DIM == WIDTH:
        return _rotate_halves(heads, norm, cos, sin, live, WIDTH, EPS)
    else:
        return _rotate_some(heads, norm, cos, sin, live, HEAD_DIM, WIDTH, ROT_DIM, EPS)


@triton.jit
def _rotate_halves(heads, norm, cos, sin, live, WIDTH: tl.constexpr, EPS: tl.constexpr):
    HALF: tl.constexpr = WIDTH // 2
    column = tl.arange(0, HALF)[None, :]
    x = tl.load(heads + column, mask=live, other=0.0).to(tl.float32)
    y = tl.load(heads + HALF + column, mask=live, other=0.0).to(tl.float32)
    if norm is not None:
        factor = tl.rsqrt(tl.sum(x * x + y * y, 1) / WIDTH + EPS)[:, None]
        x = x * factor * tl.load(norm + column)
        y = y * factor * tl.load(norm + HALF + column)
    cosine = tl.load(cos + column, mask=live, other=1.0)
    sine = tl.load(sin + column, mask=live, other=0.0)
    both = tl.join(x * cosine - y * sine, y * cosine + x * sine)
    return tl.reshape(tl.permute(both, (0, 2, 1)), (x.shape[0], WIDTH))


@triton.jit
def _rotate_some(
    heads,
    norm,
    cos,
    sin,
    live,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROT_DIM: tl.constexpr,
    EPS: tl.constexpr,
):
    # One half of the columns after the other: large tiles have no registers for what both need.
    left = tl.arange(0, WIDTH // 2)[None, :]
    right = WIDTH // 2 + left
    factor = 1.0
    if norm is not None:
        x = tl.load(heads + left, mask=live & (left < HEAD_DIM), other=0.0).to(tl.float32)
        y = tl.load(heads + right, mask=live & (right < HEAD_DIM), other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(x * x + y * y, 1) / HEAD_DIM + EPS)[:, None]
    x = _rotate_columns(left, heads, factor, norm, cos, sin, live, HEAD_DIM, ROT_DIM)
    tl.debug_barrier()
    y = _rotate_columns(right, heads, factor, norm, cos, sin, live, HEAD_DIM, ROT_DIM if ROT_DIM > WIDTH // 2 else 0)
    return tl.reshape(tl.permute(tl.join(x, y), (0, 2, 1)), (x.shape[0], WIDTH))


@triton.jit
def _rotate_columns(column, heads, factor, norm, cos, sin, live, HEAD_DIM: tl.constexpr, ROT_DIM: tl.constexpr):
    """The columns [1, N] of heads, times `factor` and `norm` if there is one, rotated as far as ROT_DIM."""
    HALF: tl.constexpr = ROT_DIM // 2
    if HALF > 0:
        rotates = live & (column < ROT_DIM)
        partner = tl.where(column < HALF, column + HALF, column - HALF)
        angle = tl.where(column < HALF, column, column - HALF)
        y = tl.load(heads + partner, mask=rotates, other=0.0).to(tl.float32)
        if norm is not None:
            y = y * factor * tl.load(norm + partner, mask=column < ROT_DIM, other=0.0)
        turned = tl.where(column < HALF, -y, y) * tl.load(sin + angle, mask=rotates, other=0.0)
        # Keeps what follows from being loaded before that is done.
        tl.debug_barrier()
    x = tl.load(heads + column, mask=live & (column < HEAD_DIM), other=0.0).to(tl.float32)
    if norm is not None:
        x = x * factor * tl.load(norm + column, mask=column < HEAD_DIM, other=0.0)
    if HALF > 0:
        x = x * tl.load(cos + angle, mask=rotates, other=1.0) + turned
    return x


@triton.jit
def _quantize(x, KIND: tl.constexpr):
    """f32 [M, N] -> KIND [M, N], f16 [M]: x divided by its row's scale, which is rounded first.

    NaN becomes 0: attention counts on 8-bit caches without any, as it reads slots that are not written yet.
    """
    LARGEST: tl.constexpr = 127.0 if tl.int8 == KIND else 448.0
    scale = tl.minimum(tl.max(tl.abs(x), 1) / LARGEST, 65504.0).to(tl.float16)
    x = tl.where(x == x, x, 0.0)
    divisor = tl.where(scale > 0.0, scale.to(tl.float32), 1.0)
    scaled = tl.clamp(tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape)), -LARGEST, LARGEST)
    if tl.int8 == KIND:
        scaled = (scaled + 12582912.0) - 12582912.0  # 1.5 · 2^23: what is left is rounded to the nearest even integer
    return scaled.to(KIND), scale
