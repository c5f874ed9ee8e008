"""The tensors of an engine: what each is made from, in which layout. Nothing is read before the engine is written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...engines.layouts import GROUPS, LAYOUTS, WITH_SUMS
from ...engines.weights import Tensor
from ..checkpoint.weights import Weight
from ..graph.builder import LazyWeight, weight_of


@dataclass(frozen=True)
class LayoutFamily:
    """The layouts of a kind of target. matrix, table: by precision; table: read row by row, of a head of its own."""

    matrix: dict[str, str]
    table: dict[str, str]
    scale: str
    bias: str


CPU_LAYOUTS = LayoutFamily(
    {
        "f32": "f32_k1n16.v0",
        "bf16": "bf16_k2n16.v0",
        "int8": "int8_k4n16.v0",
        **{f"{codes}g{group}": f"{codes}_k8n16g{group}.v0" for codes in ("int4", "uint4") for group in GROUPS},
    },
    {"f32": "rows_f32.v0", "bf16": "rows_bf16.v0"},
    "scale_f32.v0",
    "bias_f32.v0",
)
CUDA_LAYOUTS = LayoutFamily(
    {"bf16": "bf16_p128.v0", "fp8": "fp8_p128.v0", "int8": "int8_p128.v0"},
    {"bf16": "bf16_p128.v0"},
    "scale_p128.v0",
    "bias_p128.v0",
)


@dataclass(frozen=True)
class Job:
    """One stored tensor. source: lazy weight or small array; gated: gate's and up's rows interleave in panels of 16;
    what belongs to a matrix, scales, sums and zero points, are jobs without a source, filled while it is packed."""

    tensor: Tensor
    source: Weight | NDArray[np.float32] | None
    gated: bool = False


class TensorJobs:
    """Every tensor of a rank by name, each once, in layouts of one family."""

    def __init__(self, layouts: LayoutFamily) -> None:
        self.jobs: dict[str, Job] = {}
        self._layouts = layouts

    def has(self, name: str) -> bool:
        """True if there is such a tensor."""
        return name in self.jobs

    def bytes_of(self, name: str) -> int:
        """Bytes in the file."""
        return self.jobs[name].tensor.num_bytes

    def rows_of(self, name: str) -> int:
        """Rows of the logical matrix."""
        return self.jobs[name].tensor.rows

    def matrix(self, value: ir.Value, precision: str, gated: bool = False, name: str = "") -> str:
        """The packed matrix of a Linear, with the scales and sums of its layout. name: if not the value's."""
        weight, name = weight_of(value), name or value.name or ""
        layout = self._layouts.matrix[precision]
        rows = LAYOUTS[layout].gated_rows(weight.num_rows // 2) if gated else weight.num_rows
        sources = tuple(map(str, weight.parts))
        self._add(Job(Tensor(name, layout, rows, weight.num_columns, sources), weight, gated))
        groups = LAYOUTS[layout].num_groups(weight.num_columns)
        if LAYOUTS[layout].group:
            self._add(Job(Tensor(f"{name}.scale", "scale_f16_n16.v0", rows, groups), None, gated))
        elif LAYOUTS[layout].scaled:
            self._add(Job(Tensor(f"{name}.scale", self._layouts.scale, rows, 1), None, gated))
        if LAYOUTS[layout].zeros:
            self._add(Job(Tensor(f"{name}.zero", "zero_u8_n16.v0", rows, groups), None, gated))
        if layout in WITH_SUMS:
            self._add(Job(Tensor(f"{name}.sum", "sum_i32.v0", rows, 1), None, gated))
        return name

    def table(self, value: ir.Value, precision: str, apart: bool = False) -> str:
        """An embedding table: the head's own packed matrix if that is tied to it, else plain rows.

        apart: the head's is of another precision, so the table is packed beside it
        """
        tied = any(use.node.op_type == "Linear" for use in value.uses())
        if tied:
            return self.matrix(value, precision, name=f"{value.name}.table" if apart else "")
        weight, name = weight_of(value), value.name or ""
        tensor = Tensor(
            name, self._layouts.table[precision], weight.num_rows, weight.num_columns, tuple(map(str, weight.parts))
        )
        self._add(Job(tensor, weight))
        return name

    def vector(self, value: ir.Value) -> str:
        """A norm's weight or a table of frequencies, as one row of float32."""
        name = value.name or ""
        if isinstance(value.const_value, LazyWeight):
            weight = weight_of(value)
            self._add(Job(Tensor(name, "rows_f32.v0", 1, weight.num_rows, tuple(map(str, weight.parts))), weight))
        else:
            assert value.const_value is not None
            array = np.asarray(value.const_value.numpy(), np.float32)
            self._add(Job(Tensor(name, "rows_f32.v0", 1, array.size), array))
        return name

    def bias(self, value: ir.Value, gated: bool = False) -> str:
        """A bias, padded as its matrix is."""
        weight, name = weight_of(value), value.name or ""
        layout = self._layouts.bias
        rows = LAYOUTS[layout].gated_rows(weight.num_rows // 2) if gated else weight.num_rows
        self._add(Job(Tensor(name, layout, rows, 1, tuple(map(str, weight.parts))), weight, gated))
        return name

    def _add(self, job: Job) -> None:
        known = self.jobs.setdefault(job.tensor.name, job)
        assert known.tensor == job.tensor, f"{job.tensor.name} is asked for in two ways"
