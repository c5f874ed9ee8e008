"""A paged cache as CUDA engines have it, and its values as the references want them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from enginery.plugins.kv_write.cuda import StateLayout
from enginery.plugins.kv_write.reference import round_state
from numpy.typing import NDArray

from .interpreter import Pointer

Array = NDArray[Any]
TYPES: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "fp8": ml_dtypes.float8_e4m3fn, "i8": np.int8}


class PagedState:
    """Blocks of 64 tokens; in each the layers, in each the KV heads, in each K and V. Those of 8-bit types have V
    turned, and scales after it.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, kv_dtype: str, blocks: int, layers: int) -> None:
        one = StateLayout(num_kv_heads, head_dim, kv_dtype, 0)
        self.layout = StateLayout(num_kv_heads, head_dim, kv_dtype, layers * one.layer_bytes)
        self.layers = layers
        self.bytes = np.zeros((blocks, self.layout.block_bytes), np.uint8)

    def arguments(self, layer: int) -> dict[str, Pointer]:
        """The pointers of a kernel that reads or writes this layer."""
        kinds = {"state": TYPES[self.layout.kv_dtype], "state_scales": np.float16}
        names = [name for name, _ in self.layout.parameters()]
        return {name: Pointer(self.bytes.view(kinds[name]), layer * self.layout.layer_bytes) for name in names}

    def of_layers(self, layers: list[int], content: Array | None = None) -> Array:
        """The bytes of these layers, of every block."""
        content = self.bytes if content is None else content
        return content.reshape(len(content), self.layers, -1)[:, layers]

    def parts(self, layer: int, content: Array | None = None) -> tuple[Array, Array, Array, Array]:
        """Keys, values [blocks, kv_heads, 64, head_dim] and their scales [blocks, kv_heads, 64 or 0]."""
        layout, kind = self.layout, TYPES[self.layout.kv_dtype]
        heads = self.of_layers([layer], content).reshape(-1, layout.num_kv_heads, layout.head_bytes)
        size = 64 * layout.head_dim * np.dtype(kind).itemsize
        shape = (*heads.shape[:2], 64, layout.head_dim)
        keys, values = (np.ascontiguousarray(heads[..., at : at + size]).view(kind) for at in (0, size))
        scales = np.ascontiguousarray(heads[..., 2 * size :]).view(np.float16)
        if layout.kv_dtype != "bf16":
            values = values.reshape(*shape[:2], shape[3], 64).swapaxes(2, 3)
        return keys.reshape(shape), values.reshape(shape), scales[..., :64], scales[..., 64:]

    def unpacked(self, layer: int, content: Array | None = None) -> tuple[Array, Array]:
        """Keys, values f32 [blocks, 64, kv_heads, head_dim], as stored."""
        keys, values, key_scales, value_scales = self.parts(layer, content)
        wide = [x.astype(np.float32) for x in (keys, values)]
        if self.layout.kv_dtype != "bf16":
            wide = [x * s[..., None].astype(np.float32) for x, s in zip(wide, (key_scales, value_scales), strict=True)]
        return wide[0].swapaxes(1, 2), wide[1].swapaxes(1, 2)

    def fill(self, layer: int, keys: Array, values: Array, written: Array) -> None:
        """Stores f32 [blocks, 64, kv_heads, head_dim] where `written` [blocks, 64]. All else must have no effect:
        NaN in bf16 and in scales, large values in 8-bit types.
        """
        layout, kind = self.layout, TYPES[self.layout.kv_dtype]
        self.bytes[:] = 0xFF if layout.kv_dtype == "bf16" else 0x7E
        live = written[:, None, :]
        places = self.parts(layer)
        found = []
        for x, place, scales in zip((keys, values), places[:2], places[2:], strict=True):
            wide = round_state(x, layout.kv_dtype).swapaxes(1, 2)
            if layout.kv_dtype != "bf16":
                largest = np.float32(448 if layout.kv_dtype == "fp8" else 127)
                scale = (np.abs(x).max(axis=-1) / largest).astype(np.float16).swapaxes(1, 2)
                wide = np.rint(wide / scale[..., None]) if kind is np.int8 else wide / scale[..., None]
                scales = np.where(live, scale, np.float16(np.nan))
            found.append((np.where(live[..., None], wide.astype(kind), place), scales))
        (new_keys, key_scales), (new_values, value_scales) = found
        if layout.kv_dtype != "bf16":
            new_values = new_values.swapaxes(2, 3)
        parts = [new_keys, new_values] + ([] if layout.kv_dtype == "bf16" else [key_scales, value_scales])
        content = self.bytes.reshape(len(self.bytes), self.layers, layout.num_kv_heads, layout.head_bytes)
        content[:, layer] = np.concatenate([_bytes(part) for part in parts], axis=-1)


def _bytes(x: Array) -> Array:
    """[blocks, kv_heads, …] -> u8 [blocks, kv_heads, bytes]."""
    return np.ascontiguousarray(x).view(np.uint8).reshape(*x.shape[:2], -1)
