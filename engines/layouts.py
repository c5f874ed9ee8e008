"""Names of weight layouts, their padding and bytes (FORMAT.md). Packing itself is in plugins/linear."""

from __future__ import annotations

from dataclasses import dataclass

ROW_PADDING = 16
COLUMN_PADDING = 64


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
    """How the elements of a tensor lie. element_bytes: of one weight; padded: rows to 16 and columns to 64."""

    element_bytes: int
    padded: bool
    vector: bool = False

    def num_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a [rows, columns] tensor; of a vector, columns is 1."""
        if self.vector:
            return padded_rows(rows) * self.element_bytes
        if self.padded:
            return padded_rows(rows) * padded_columns(columns) * self.element_bytes
        return rows * columns * self.element_bytes


LAYOUTS: dict[str, Layout] = {
    "rows_f32.v0": Layout(4, padded=False),
    "rows_bf16.v0": Layout(2, padded=False),
    "f32_k1n16.v0": Layout(4, padded=True),
    "bf16_k2n16.v0": Layout(2, padded=True),
    "int8_k4n16.v0": Layout(1, padded=True),
    "scale_f32.v0": Layout(4, padded=True, vector=True),
    "sum_i32.v0": Layout(4, padded=True, vector=True),
    "bias_f32.v0": Layout(4, padded=True, vector=True),
}
