"""From the fused graph to the plan of a CPU rank: calls of the runtime's kernels in parallel regions.

Between two regions all threads wait for each other, so a layer has few of them: norm-quantize-QKV, KV write, attention,
quantize-O, norm-quantize-gate-up, quantize-down. Up to _PRIVATE_ROWS rows every thread normalises and quantizes for
itself in a buffer of its own, which is cheaper than waiting; above, rows are shared out in a region of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from ...engines.expressions import Expression
from ...engines.layouts import padded_columns
from ...engines.plan import Attribute, Buffer, Call, Operand, Plan, Range
from ..graph.builder import GraphBuilder, attribute, columns_of, rows_of
from ..graph.rewrite import is_ours, users
from ..models.config import Config
from ..models.layers import group_name
from ..passes.options import Options
from .lowering import ELEMENT_BYTES, UNBOUNDED, Lowering, View
from .state import layer_in_group
from .tensors import CPU_LAYOUTS, TensorJobs

_PRIVATE_ROWS = 4


@dataclass
class CpuLowering(Lowering):
    """Appends calls, buffers and tensors as it walks the graph."""

    calls: list[Call] = field(default_factory=list)
    region: int = 0

    def lower(self) -> Plan:
        """The plan of this rank."""
        self.walk()
        return self.plan(self.calls, list(self.buffers.values()))

    # -- the pieces that calls are made of ------------------------------------------------------------------------

    def _new(
        self, value: ir.Value, dtype: str = "f32", private: bool = False, compact: bool = False, sums: bool = False
    ) -> View:
        """A buffer for `value`; one for each thread, of a few rows, if private. sums: with those of each 32."""
        name, rows, columns = value.name or "", str(rows_of(value)), columns_of(value)
        name = f"{name}.private" if private else name
        stride = columns if compact else padded_columns(columns)
        count: Expression = ["min", rows, _PRIVATE_ROWS] if private else rows
        bytes_: Expression = ["*", count, stride * ELEMENT_BYTES[dtype]]
        self.buffers[name] = Buffer(name, dtype, bytes_, 0, private)
        scale = ""
        if dtype in ("i8", "u8"):
            scale = f"{name}.scale"
            self.buffers[scale] = Buffer(scale, "f32", ["*", count, 4], 0, private)
        if sums:
            self.buffers[f"{name}.sums"] = Buffer(f"{name}.sums", "i32", ["*", count, stride // 32 * 4], 0, private)
        return View(name, rows, columns, stride, dtype, 0, scale, f"{name}.sums" if sums else "")

    def _sums(self, view: View, access: str) -> Operand | None:
        return Operand("buffer", view.sums, 0, ["*", view.rows, view.stride // 32 * 4], access) if view.sums else None

    def _inputs(self, *names: str) -> dict[str, Operand]:
        return {name: Operand("input", name) for name in names}

    def _call(
        self,
        op: str,
        operands: dict[str, Operand | None],
        attributes: dict[str, Attribute],
        guard: tuple[Range, ...] = (),
    ) -> None:
        """Appends a call to the current region."""
        present = {name: operand for name, operand in operands.items() if operand is not None}
        self.calls.append(Call(op, 0, self.region, present, attributes, guard))

    def _next_region(self) -> None:
        self.region += 1

    # -- one method for each operator of the graph ----------------------------------------------------------------

    def _RotaryTable(self, node: ir.Node) -> None:
        names = ("inv_freq", "inv_freq_long")
        weights = {
            name: self._weight(self.jobs.vector(value))
            for name, value in zip(names, node.inputs[2:], strict=False)
            if value is not None
        }
        for value in node.outputs:
            self.views[value] = self._new(value, compact=True)
        outputs = {"cos": self._at(self.views[node.outputs[0]], "w"), "sin": self._at(self.views[node.outputs[1]], "w")}
        attributes = {name: attribute(node, name) for name in node.attributes}
        self._call("rotary_table", {**self._inputs("positions", "prompt_lengths"), **weights, **outputs}, attributes)

    def _Embedding(self, node: ir.Node) -> None:
        table = node.inputs[1]
        assert table is not None
        codes = any(is_ours(user, "Linear") and self._has_codes(user) for user in users(table))
        name = self.jobs.table(table, attribute(node, "precision"), apart=codes)
        out = self.views[node.outputs[0]] = self._new(node.outputs[0])
        operands = {
            **self._inputs("token_ids"),
            "table": self._weight(name),
            "table_scale": self._beside(f"{name}.scale"),
            "out": self._at(out, "w"),
        }
        attributes: dict[str, Attribute] = {
            "hidden": out.columns,
            "vocab": self.jobs.rows_of(name),
            "scale": float(attribute(node, "scale")),
            "vocab_start": attribute(node, "vocab_start"),
        }
        self._call("embedding", operands, attributes)
        self._next_region()

    def _has_codes(self, linear: ir.Node) -> bool:
        return "int4" in str(attribute(linear, "precision"))

    def _RmsNorm(self, node: ir.Node) -> None:
        """A norm with the quantization behind it and, if one product alone reads it, that product."""
        out = node.outputs[0]
        quantize = next((user for user in users(out) if is_ours(user, "Quantize")), None)
        if quantize is not None:
            assert len(users(out)) == 1, f"{node.name}: read both quantized and not"
        if len(node.outputs) > 1:
            self.views[node.outputs[1]] = self._new(node.outputs[1])
        self._prepared(node, quantize)

    def _Quantize(self, node: ir.Node) -> None:
        self._prepared(None, node)

    def _prepared(self, norm: ir.Node | None, quantize: ir.Node | None) -> None:
        """rms_norm of `norm` and `quantize` (either may be missing), in both variants, with its product."""
        last = quantize if quantize is not None else norm
        assert last is not None
        value, readers = last.outputs[0], users(last.outputs[0])
        dtype, sums = self._activation_dtype(quantize)
        rows = str(rows_of(value))
        if len(readers) == 1 and is_ours(readers[0], "Linear"):
            few, many = (Range(rows, 0, _PRIVATE_ROWS),), (Range(rows, _PRIVATE_ROWS + 1, UNBOUNDED),)
            private, shared = self._new(value, dtype, private=True, sums=sums), self._new(value, dtype, sums=sums)
            output = self._linear_output(readers[0])
            self._norm_call(norm, last, private, few)
            self._linear_call(readers[0], private, output, few)
            self._next_region()
            self._norm_call(norm, last, shared, many)
            self._next_region()
            self._linear_call(readers[0], shared, output, many)
            self.views[value] = shared
        else:
            self.views[value] = self._new(value, dtype, sums=sums)
            self._norm_call(norm, last, self.views[value], ())
        self._next_region()

    def _activation_dtype(self, quantize: ir.Node | None) -> tuple[str, bool]:
        """As its readers want it; and whether they want sums too, as those do whose weights are codes, all positive."""
        precision = attribute(quantize, "precision") if quantize is not None else "f32"
        if quantize is None or precision != "int8":
            return str(precision), False
        weights = {str(attribute(user, "precision")) for user in users(quantize.outputs[0]) if is_ours(user, "Linear")}
        if weights != {"int8"}:
            return "i8", True  # which products of int8 read too
        return "u8" if self.options.target.unsigned_activations else "i8", False

    def _norm_call(self, norm: ir.Node | None, last: ir.Node, out: View, guard: tuple[Range, ...]) -> None:
        x, delta, post_weight, weight = norm.inputs if norm is not None else (last.inputs[0], None, None, None)
        total = self.views[norm.outputs[1]] if norm is not None and len(norm.outputs) > 1 else None
        operands = {
            "x": self._at(self._view(x), "r"),
            "delta": self._at(self._view(delta), "r") if delta is not None else None,
            "post_weight": self._vector(post_weight),
            "weight": self._vector(weight),
            "sum": self._at(total, "w") if total is not None else None,
            "out": self._at(out, "w"),
            "out_scale": self._scale(out, "w"),
            "out_sums": self._sums(out, "w"),
        }
        eps = float(attribute(norm, "eps")) if norm is not None else 0.0
        self._call("rms_norm", operands, {"hidden": out.columns, "eps": eps, "domain": out.rows}, guard)

    def _Linear(self, node: ir.Node) -> None:
        """A product whose input somebody else reads too, or needs no preparation."""
        self._linear_call(node, self._view(node.inputs[0]), self._linear_output(node), ())
        self._next_region()

    def _linear_output(self, node: ir.Node) -> View:
        self.views[node.outputs[0]] = self._new(node.outputs[0])
        return self.views[node.outputs[0]]

    def _linear_call(self, node: ir.Node, a: View, out: View, guard: tuple[Range, ...]) -> None:
        _, weight, bias, residual, *_ = [*node.inputs, None, None]
        activation = str(attribute(node, "activation"))
        assert weight is not None
        name = self.jobs.matrix(weight, attribute(node, "precision"), gated=activation != "none")
        operands = {
            "a": self._at(a, "r"),
            "a_scale": self._scale(a, "r"),
            "a_sums": self._sums(a, "r"),
            "weight": self._weight(name),
            "weight_scale": self._beside(f"{name}.scale"),
            "weight_zero": self._beside(f"{name}.zero"),
            "weight_sum": self._beside(f"{name}.sum"),
            "bias": self._weight(self.jobs.bias(bias, gated=activation != "none")) if bias is not None else None,
            "residual": self._at(self._view(residual), "r") if residual is not None else None,
            "out": self._at(out, "w"),
        }
        attributes: dict[str, Attribute] = {
            "n": out.columns,
            "k": a.columns,
            "activation": activation,
            "softcap": float(attribute(node, "softcap", 0.0)),
            "domain": out.rows,
        }
        self._call("linear", operands, attributes, guard)

    def _Gather(self, node: ir.Node) -> None:
        """Rows of activations; attention reads those of positions and rotary tables through `rows` itself."""
        if all(is_ours(user, "PagedAttention") for user in users(node.outputs[0])):
            source = node.inputs[0]
            if source in self.views:
                self.views[node.outputs[0]] = self._view(source)
            return
        x, out = self._view(node.inputs[0]), self._new(node.outputs[0])
        self.views[node.outputs[0]] = out
        self._call(
            "gather_rows",
            {**self._inputs("rows"), "x": self._at(x, "r"), "out": self._at(out, "w")},
            {"columns": out.columns},
        )
        self._next_region()

    def _WriteKv(self, node: ir.Node) -> None:
        k, v, _, _, _, cos, sin, k_norm = node.inputs
        key, value = self._view(k), self._view(v)
        assert key.stride == value.stride
        operands = {
            **self._inputs("positions", "slots"),
            "k": self._at(key, "r"),
            "v": self._at(value, "r"),
            "cos": self._at(self._view(cos), "r"),
            "sin": self._at(self._view(sin), "r"),
            "k_norm": self._vector(k_norm),
            "state": self._state(attribute(node, "layer"), "rw"),
        }
        attributes = self._heads(node) | {"k_offset": key.offset, "v_offset": value.offset, "stride": key.stride}
        self._call("kv_write", operands, attributes)
        self._next_region()

    def _PagedAttention(self, node: ir.Node) -> None:
        q, keys, _, _, _, _, cos, sin, q_norm = node.inputs
        query, out = self._view(q), self._new(node.outputs[0])
        self.views[node.outputs[0]] = out
        writer = keys.producer() if keys is not None else None
        assert writer is not None, f"{node.name}: reads a cache that nobody writes"
        operands = {
            **self._inputs("block_table", "positions", *(["rows"] if out.rows == "rows" else [])),
            "q": self._at(query, "r"),
            "cos": self._at(self._view(cos), "r"),
            "sin": self._at(self._view(sin), "r"),
            "q_norm": self._vector(q_norm),
            "state": self._state(attribute(writer, "layer"), "r"),
            "out": self._at(out, "w"),
        }
        attributes = self._heads(node) | {
            "num_heads": attribute(node, "num_heads"),
            "scale": float(attribute(node, "scale")),
            "softcap": float(attribute(node, "softcap")),
            "window": attribute(node, "window"),
            "q_offset": query.offset,
            "stride": query.stride,
            "domain": out.rows,
        }
        self._call("attention", operands, attributes)
        self._next_region()

    def _heads(self, node: ir.Node) -> dict[str, Attribute]:
        return {
            "num_kv_heads": self.config.num_kv_heads // self.options.world_size,
            "head_dim": self.config.head_dim,
            "rot_dim": attribute(node, "rot_dim"),
            "eps": float(attribute(node, "eps")),
        }

    def _state(self, layer: int, access: str) -> Operand:
        group = group_name(self.config.windows[layer])
        return Operand("state", group, 0, 0, access, layer_in_group(self.config, layer))

    def _AllReduce(self, node: ir.Node) -> None:
        x, out = self._view(node.inputs[0]), self._new(node.outputs[0])
        self.views[node.outputs[0]] = out
        self._call(
            "all_reduce",
            {"x": self._at(x, "r"), "out": self._at(out, "w")},
            {"columns": out.columns, "domain": out.rows},
        )
        self._next_region()

    def _AllGather(self, node: ir.Node) -> None:
        x, out = self._view(node.inputs[0]), self._new(node.outputs[0])
        self.views[node.outputs[0]] = out
        starts = ",".join(map(str, attribute(node, "starts")[:-1]))
        attributes: dict[str, Attribute] = {"columns": out.columns, "starts": starts, "domain": out.rows}
        self._call("all_gather", {"x": self._at(x, "r"), "out": self._at(out, "w")}, attributes)
        self._next_region()


def lower(g: GraphBuilder, config: Config, options: Options) -> tuple[Plan, TensorJobs]:
    """The plan of this rank, and how each of its tensors is made."""
    jobs = TensorJobs(CPU_LAYOUTS)
    return CpuLowering(g, config, options, jobs).lower(), jobs
