"""Names of weight layouts, their padding and bytes (FORMAT.md). Packing itself is in plugins/linear."""

from __future__ import annotations

from dataclasses import dataclass

ROW_PADDING = 16
COLUMN_PADDING = 64
GPU_PADDING = 128


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def padded_rows(rows: int) -> int:
    """Np: rows as packed layouts hold them."""
    return round_up(rows, ROW_PADDING)


def padded_columns(columns: int) -> int:
    """Kp: columns as packed layouts and activation buffers hold them."""
    return round_up(columns, COLUMN_PADDING)


@dataclass(frozen=True)
class Layout:
    """How the elements of a tensor lie.

    element_bytes   of one weight
    row_padding, column_padding  to what rows and columns are padded with zeros; a vector has no columns
    panels          rows lie in panels of 16, and those of a gated weight interleave by panels; else one by one
    scaled          each row has a scale, in a tensor of its own
    """

    element_bytes: int
    row_padding: int = 1
    column_padding: int = 1
    vector: bool = False
    panels: bool = False
    scaled: bool = False

    def num_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a [rows, columns] tensor; of a vector, columns is 1."""
        across = 1 if self.vector else round_up(columns, self.column_padding)
        return round_up(rows, self.row_padding) * across * self.element_bytes

    def gated_rows(self, rows: int) -> int:
        """Rows of the tensor that interleaves two matrices of `rows` rows."""
        return 2 * padded_rows(rows) if self.panels else 2 * rows


# On the CPU panels of 16 rows, columns to 64; on a GPU rows and columns to 128.
def _panels(element_bytes: int, scaled: bool = False) -> Layout:
    return Layout(element_bytes, ROW_PADDING, COLUMN_PADDING, panels=True, scaled=scaled)


def _padded(element_bytes: int, scaled: bool = False) -> Layout:
    return Layout(element_bytes, GPU_PADDING, GPU_PADDING, scaled=scaled)


LAYOUTS: dict[str, Layout] = {
    "rows_f32.v0": Layout(4),
    "rows_bf16.v0": Layout(2),
    "f32_k1n16.v0": _panels(4),
    "bf16_k2n16.v0": _panels(2),
    "int8_k4n16.v0": _panels(1, scaled=True),
    "scale_f32.v0": Layout(4, ROW_PADDING, vector=True, panels=True),
    "sum_i32.v0": Layout(4, ROW_PADDING, vector=True, panels=True),
    "bias_f32.v0": Layout(4, ROW_PADDING, vector=True, panels=True),
    "bf16_p128.v0": _padded(2),
    "fp8_p128.v0": _padded(1, scaled=True),
    "int8_p128.v0": _padded(1, scaled=True),
    "scale_p128.v0": Layout(4, GPU_PADDING, vector=True),
    "bias_p128.v0": Layout(4, GPU_PADDING, vector=True),
}
# What unsigned activations need: kernels take 128 times these off.
WITH_SUMS = ("int8_k4n16.v0",)
