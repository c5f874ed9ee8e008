"""Names of weight layouts, their padding and bytes (FORMAT.md). Packing itself is in plugins/linear."""

from __future__ import annotations

from dataclasses import dataclass

ROW_PADDING = 16
COLUMN_PADDING = 64
GPU_PADDING = 128
# Columns that share a scale, of weights of four bits.
GROUPS = (32, 64, 128)


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

    bits            of one weight
    row_padding, column_padding  to what rows and columns are padded with zeros; a vector has no columns
    panels          rows lie in panels of 16, and those of a gated weight interleave by panels; else one by one
    scaled          each row has a scale, or each group of it, in a tensor of its own
    group           columns of a group; 0: a row is one
    zeros           each group has a zero point too, in a tensor of its own
    """

    bits: int
    row_padding: int = 1
    column_padding: int = 1
    vector: bool = False
    panels: bool = False
    scaled: bool = False
    group: int = 0
    zeros: bool = False

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row; of a vector, columns is 1."""
        return (1 if self.vector else round_up(columns, self.column_padding)) * self.bits // 8

    def num_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a [rows, columns] tensor; of a vector, columns is 1."""
        return round_up(rows, self.row_padding) * self.row_bytes(columns)

    def num_groups(self, columns: int) -> int:
        """Scales of a row of so many columns."""
        return -(-padded_columns(columns) // self.group) if self.group else 1

    def gated_rows(self, rows: int) -> int:
        """Rows of the tensor that interleaves two matrices of `rows` rows."""
        return 2 * padded_rows(rows) if self.panels else 2 * rows


# On the CPU panels of 16 rows, columns to 64; on a GPU rows and columns to 128.
def _panels(bits: int, scaled: bool = False, group: int = 0, zeros: bool = False) -> Layout:
    return Layout(bits, ROW_PADDING, COLUMN_PADDING, panels=True, scaled=scaled, group=group, zeros=zeros)


def _padded(bits: int, scaled: bool = False) -> Layout:
    return Layout(bits, GPU_PADDING, GPU_PADDING, scaled=scaled)


LAYOUTS: dict[str, Layout] = {
    "rows_f32.v0": Layout(32),
    "rows_bf16.v0": Layout(16),
    "f32_k1n16.v0": _panels(32),
    "bf16_k2n16.v0": _panels(16),
    "int8_k4n16.v0": _panels(8, scaled=True),
    **{f"int4_k8n16g{group}.v0": _panels(4, scaled=True, group=group) for group in GROUPS},
    **{f"uint4_k8n16g{group}.v0": _panels(4, scaled=True, group=group, zeros=True) for group in GROUPS},
    "scale_f32.v0": Layout(32, ROW_PADDING, vector=True, panels=True),
    "scale_f16_n16.v0": Layout(16, ROW_PADDING, panels=True),
    "zero_u8_n16.v0": Layout(8, ROW_PADDING, panels=True),
    "sum_i32.v0": Layout(32, ROW_PADDING, vector=True, panels=True),
    "bias_f32.v0": Layout(32, ROW_PADDING, vector=True, panels=True),
    "bf16_p128.v0": _padded(16),
    "fp8_p128.v0": _padded(8, scaled=True),
    "int8_p128.v0": _padded(8, scaled=True),
    "scale_p128.v0": Layout(32, GPU_PADDING, vector=True),
    "bias_p128.v0": Layout(32, GPU_PADDING, vector=True),
}
# What unsigned activations need: kernels take 128 times these off.
WITH_SUMS = ("int8_k4n16.v0",)
