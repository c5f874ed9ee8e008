"""From the fused graph to the plan of a CPU rank: calls of the runtime's kernels in parallel regions.

Between two regions all threads wait for each other, so a layer has few of them: norm-quantize-QKV, KV write, attention,
quantize-O, norm-quantize-gate-up, quantize-down. Up to _PRIVATE_ROWS rows every thread normalises and quantizes for
itself in a buffer of its own, which is cheaper than waiting; above, rows are shared out in a region of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from ...engines.errors import CompileError
from ...engines.expressions import Expression
from ...engines.layouts import padded_columns
from ...engines.plan import Attribute, Buffer, Call, Logits, Operand, Plan, Range
from ..graph.builder import GraphBuilder, attribute, columns_of, rows_of
from ..graph.rewrite import is_ours, users
from ..models.config import Config
from ..models.layers import group_name
from ..passes.options import Options
from .memory import assign_slots
from .state import layer_in_group, prefix_key, state_groups
from .tensors import CPU_LAYOUTS, TensorJobs

_PRIVATE_ROWS = 4
_ELEMENT_BYTES = {"f32": 4, "bf16": 2, "i8": 1, "u8": 1}
_UNBOUNDED = 1 << 40


@dataclass(frozen=True)
class View:
    """Columns [offset, offset + columns) of a buffer, rows `stride` elements apart; scale: the buffer of its scales."""

    buffer: str
    rows: str
    columns: int
    stride: int
    dtype: str = "f32"
    offset: int = 0
    scale: str = ""

    @property
    def extent(self) -> Expression:
        """Bytes of all rows."""
        return ["*", self.rows, self.stride * _ELEMENT_BYTES[self.dtype]]


@dataclass
class CpuLowering:
    """Appends calls, buffers and tensors as it walks the graph."""

    g: GraphBuilder
    config: Config
    options: Options
    jobs: TensorJobs
    calls: list[Call] = field(default_factory=list)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    views: dict[ir.Value, View] = field(default_factory=dict)
    region: int = 0

    def lower(self) -> Plan:
        """The plan of this rank."""
        for node in self.g.graph:
            if node.outputs[0] in self.views:
                continue
            method = getattr(self, f"_{node.op_type}", None)
            if method is None:
                raise CompileError(
                    f"node {node.name!r}: {self.options.target.name} has no kernel for {node.op_type}, and no pass "
                    f"makes another operator of it. Models are written in what compiler/models/layers.py offers."
                )
            method(node)
        output = next(value for value in self.g.graph.outputs if value.name == "logits")
        view = self.views[output]
        buffers = assign_slots(list(self.buffers.values()), self.calls, kept={view.buffer})
        names = {op.name for call in self.calls for op in call.operands.values() if op.kind == "input"}
        return Plan(
            rank=self.options.rank,
            world_size=self.options.world_size,
            step_inputs=tuple(sorted(names)),
            state_groups=state_groups(self.config, self.options),
            buffers=tuple(buffers),
            forward=tuple(self.calls),
            logits=Logits(view.buffer, self.config.vocab_size, view.stride),
            prefix_key=prefix_key(self.config),
        )

    # -- the pieces that calls are made of ------------------------------------------------------------------------

    def _new(self, value: ir.Value, dtype: str = "f32", private: bool = False, compact: bool = False) -> View:
        """A buffer for `value`; one for each thread, of a few rows, if private."""
        name, rows, columns = value.name or "", str(rows_of(value)), columns_of(value)
        name = f"{name}.private" if private else name
        stride = columns if compact else padded_columns(columns)
        count: Expression = ["min", rows, _PRIVATE_ROWS] if private else rows
        bytes_: Expression = ["*", count, stride * _ELEMENT_BYTES[dtype]]
        self.buffers[name] = Buffer(name, dtype, bytes_, 0, private)
        scale = ""
        if dtype in ("i8", "u8"):
            scale = f"{name}.scale"
            self.buffers[scale] = Buffer(scale, "f32", ["*", count, 4], 0, private)
        return View(name, rows, columns, stride, dtype, 0, scale)

    def _view(self, value: ir.Value | None) -> View:
        assert value is not None
        return self.views[value]

    def _read(self, view: View) -> Operand:
        return Operand("buffer", view.buffer, 0, view.extent, "r")

    def _write(self, view: View) -> Operand:
        return Operand("buffer", view.buffer, 0, view.extent, "w")

    def _scale(self, view: View, access: str) -> Operand:
        return Operand("buffer", view.scale, 0, ["*", view.rows, 4], access)

    def _weight(self, name: str) -> Operand:
        return Operand("weight", name, 0, self.jobs.bytes_of(name), "r")

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
        outputs = {"cos": self._write(self.views[node.outputs[0]]), "sin": self._write(self.views[node.outputs[1]])}
        attributes = {name: attribute(node, name) for name in node.attributes}
        self._call("rotary_table", {**self._inputs("positions", "prompt_lengths"), **weights, **outputs}, attributes)

    def _Embedding(self, node: ir.Node) -> None:
        table = node.inputs[1]
        assert table is not None
        name = self.jobs.table(table, attribute(node, "precision"))
        out = self.views[node.outputs[0]] = self._new(node.outputs[0])
        operands = {
            **self._inputs("token_ids"),
            "table": self._weight(name),
            "table_scale": self._weight(f"{name}.scale") if self.jobs.has(f"{name}.scale") else None,
            "out": self._write(out),
        }
        attributes: dict[str, Attribute] = {
            "hidden": out.columns,
            "vocab": self.jobs.rows_of(name),
            "scale": float(attribute(node, "scale")),
            "vocab_start": attribute(node, "vocab_start"),
        }
        self._call("embedding", operands, attributes)
        self._next_region()

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
        dtype = self._activation_dtype(quantize)
        rows = str(rows_of(value))
        if len(readers) == 1 and is_ours(readers[0], "Linear"):
            few, many = (Range(rows, 0, _PRIVATE_ROWS),), (Range(rows, _PRIVATE_ROWS + 1, _UNBOUNDED),)
            private, shared = self._new(value, dtype, private=True), self._new(value, dtype)
            output = self._linear_output(readers[0])
            self._norm_call(norm, last, private, few)
            self._linear_call(readers[0], private, output, few)
            self._next_region()
            self._norm_call(norm, last, shared, many)
            self._next_region()
            self._linear_call(readers[0], shared, output, many)
            self.views[value] = shared
        else:
            self.views[value] = self._new(value, dtype)
            self._norm_call(norm, last, self.views[value], ())
        self._next_region()

    def _activation_dtype(self, quantize: ir.Node | None) -> str:
        precision = attribute(quantize, "precision") if quantize is not None else "f32"
        if precision == "int8":
            return "u8" if self.options.target.unsigned_activations else "i8"
        return str(precision)

    def _norm_call(self, norm: ir.Node | None, last: ir.Node, out: View, guard: tuple[Range, ...]) -> None:
        x, delta, post_weight, weight = norm.inputs if norm is not None else (last.inputs[0], None, None, None)
        total = self.views[norm.outputs[1]] if norm is not None and len(norm.outputs) > 1 else None
        operands = {
            "x": self._read(self._view(x)),
            "delta": self._read(self._view(delta)) if delta is not None else None,
            "post_weight": self._weight(self.jobs.vector(post_weight)) if post_weight is not None else None,
            "weight": self._weight(self.jobs.vector(weight)) if weight is not None else None,
            "sum": self._write(total) if total is not None else None,
            "out": self._write(out),
            "out_scale": self._scale(out, "w") if out.scale else None,
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
            "a": self._read(a),
            "a_scale": self._scale(a, "r") if a.scale else None,
            "weight": self._weight(name),
            "weight_scale": self._weight(f"{name}.scale") if a.scale else None,
            "weight_sum": self._weight(f"{name}.sum") if a.scale else None,
            "bias": self._weight(self.jobs.bias(bias, gated=activation != "none")) if bias is not None else None,
            "residual": self._read(self._view(residual)) if residual is not None else None,
            "out": self._write(out),
        }
        attributes: dict[str, Attribute] = {
            "n": out.columns,
            "k": a.columns,
            "activation": activation,
            "softcap": float(attribute(node, "softcap", 0.0)),
            "domain": out.rows,
        }
        self._call("linear", operands, attributes, guard)

    def _Split(self, node: ir.Node) -> None:
        """No call: its outputs are columns of its input."""
        whole, offset = self._view(node.inputs[0]), 0
        for value in node.outputs:
            columns = columns_of(value)
            self.views[value] = View(whole.buffer, whole.rows, columns, whole.stride, "f32", offset)
            offset += columns

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
            {**self._inputs("rows"), "x": self._read(x), "out": self._write(out)},
            {"columns": out.columns},
        )
        self._next_region()

    def _WriteKv(self, node: ir.Node) -> None:
        k, v, _, _, _, cos, sin, k_norm = node.inputs
        key, value = self._view(k), self._view(v)
        assert key.stride == value.stride
        operands = {
            **self._inputs("positions", "slots"),
            "k": self._read(key),
            "v": self._read(value),
            "cos": self._read(self._view(cos)),
            "sin": self._read(self._view(sin)),
            "k_norm": self._weight(self.jobs.vector(k_norm)) if k_norm is not None else None,
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
            "q": self._read(query),
            "cos": self._read(self._view(cos)),
            "sin": self._read(self._view(sin)),
            "q_norm": self._weight(self.jobs.vector(q_norm)) if q_norm is not None else None,
            "state": self._state(attribute(writer, "layer"), "r"),
            "out": self._write(out),
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
            "all_reduce", {"x": self._read(x), "out": self._write(out)}, {"columns": out.columns, "domain": out.rows}
        )
        self._next_region()

    def _AllGather(self, node: ir.Node) -> None:
        x, out = self._view(node.inputs[0]), self._new(node.outputs[0])
        self.views[node.outputs[0]] = out
        starts = ",".join(map(str, attribute(node, "starts")[:-1]))
        attributes: dict[str, Attribute] = {"columns": out.columns, "starts": starts, "domain": out.rows}
        self._call("all_gather", {"x": self._read(x), "out": self._write(out)}, attributes)
        self._next_region()


def lower(g: GraphBuilder, config: Config, options: Options) -> tuple[Plan, TensorJobs]:
    """The plan of this rank, and how each of its tensors is made."""
    jobs = TensorJobs(CPU_LAYOUTS)
    return CpuLowering(g, config, options, jobs).lower(), jobs
