"""From the fused graph to the plan of a GPU rank: launches of kernels, one after the other.

Launches decide how fast a single sequence is answered, so a layer has few of them. Up to some rows a product normalises
and quantizes its own input: then norms and quantizations are launched for larger steps alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from ...engines.layouts import GPU_PADDING, round_up
from ...engines.plan import Attribute, Buffer, Operand, Plan, Range, Value
from ...engines.plan import Launch as PlannedLaunch
from ...plugins.all_gather import cuda as all_gather
from ...plugins.all_reduce import cuda as all_reduce
from ...plugins.attention import cuda as attention
from ...plugins.embedding import cuda as embedding
from ...plugins.gather_rows import cuda as gather_rows
from ...plugins.kv_write import cuda as kv_write
from ...plugins.launches import Kernel, Launch
from ...plugins.linear import cuda as linear
from ...plugins.rms_norm import cuda as rms_norm
from ...plugins.rotary_table import cuda as rotary_table
from ..cuda.choice import Choice
from ..graph.builder import GraphBuilder, attribute, columns_of, rows_of
from ..graph.rewrite import is_ours, users
from ..models.config import Config
from ..models.layers import group_name
from ..passes.options import Options
from .collectives import Collectives, is_part
from .lowering import ELEMENT_BYTES, UNBOUNDED, Lowering, View
from .sampling import DRAWN_TOKENS, lower_sampling
from .scratch import Scratchpad
from .state import layer_in_group, state_groups
from .tensors import CUDA_LAYOUTS, TensorJobs

_STEP_INPUTS = (
    *("token_ids", "positions", "prompt_lengths", "token_sequence", "rows", "decode_tokens", "tiles"),
    *("temperature", "top_k", "top_p", "min_p", "seed", "num_generated"),
    *("edit_slots", "presence_penalty", "frequency_penalty", "repetition_penalty"),
)
_GROUP_INPUTS = ("slots", "block_table")
# As the graph calls what a product reads -> as plans call the type.
_ACTIVATIONS = {"bf16": "bf16", "fp8": "fp8", "int8": "i8"}


@dataclass
class CudaLowering(Lowering):
    """Appends launches, buffers and tensors as it walks the graph."""

    launches: list[PlannedLaunch] = field(default_factory=list)
    ways: dict[str, tuple[Kernel, ...]] = field(default_factory=dict)
    others: dict[int, tuple[PlannedLaunch, ...]] = field(default_factory=dict)
    made: dict[Hashable, tuple[Launch, ...]] = field(default_factory=dict)
    scratchpad: Scratchpad = field(default_factory=Scratchpad)

    def __post_init__(self) -> None:
        self.groups = state_groups(self.config, self.options)
        self.arch = self.options.target.arch
        self.collectives = Collectives.of(self.g.graph, self.options)

    def lower(self) -> Plan:
        """The plan of this rank, without its kernels' machine code."""
        self.walk()
        size, logits = len(self.launches), self.logits()

        def append(
            launches: tuple[Launch, ...], operands: Mapping[str, Operand | None], guard: tuple[Range, ...] = ()
        ) -> None:
            self._launch(launches, operands, guard=guard)

        draws = lower_sampling(logits, self.config.vocab_size, self.arch, self.buffers, append)
        buffers = [*self.buffers.values(), *self.scratchpad.buffers(), *self.collectives.buffers()]
        plan = self.plan(self.launches, buffers, attention.TILE_TOKENS)
        sample = tuple(self.launches[size:])
        return replace(plan, forward=tuple(self.launches[:size]), sample=sample, draws=draws)

    # -- the pieces that launches are made of ---------------------------------------------------------------------

    def _new(self, value: ir.Value, dtype: str = "bf16", stride: int = 0, rows: str = "") -> View:
        """A buffer for `value`; the stride is its columns padded, if none is given."""
        name, rows, columns = value.name or "", rows or str(rows_of(value)), columns_of(value)
        stride = stride or round_up(columns, GPU_PADDING)
        if is_part(value):
            self.views[value] = View(self.collectives.exchange(value, dtype), rows, columns, stride, dtype)
            return self.views[value]
        self.buffers[name] = Buffer(name, dtype, ["*", rows, stride * ELEMENT_BYTES[dtype]], 0)
        scale = ""
        if dtype in ("fp8", "i8"):
            scale = f"{name}.scale"
            self.buffers[scale] = Buffer(scale, "f32", ["*", rows, 4], 0)
        self.views[value] = View(name, rows, columns, stride, dtype, 0, scale)
        return self.views[value]

    def _launch(
        self,
        launches: tuple[Launch, ...],
        operands: Mapping[str, Operand | None],
        count: str = "tokens",
        guard: tuple[Range, ...] = (),
        group: int = -1,
    ) -> None:
        """Appends launches with these operands. count: the variable of the parameter `count`; group: of its state."""
        for launch in launches:
            planned, *others = (self._planned(each, operands, count, guard, group) for each in (launch, *launch.others))
            way = (launch.kernel, *(each.kernel for each in launch.others))
            assert self.ways.setdefault(planned.kernel, way) == way, f"{planned.kernel} has others elsewhere"
            self.others[planned.region] = tuple(others)
            self.launches.append(planned)

    def _planned(
        self, launch: Launch, operands: Mapping[str, Operand | None], count: str, guard: tuple[Range, ...], group: int
    ) -> PlannedLaunch:
        arguments: dict[str, Operand | Value] = {}
        for name, kind in launch.kernel.parameters:
            if name in launch.scratch:
                arguments[name] = self.scratchpad.operand(name, launch)
            elif (operand := operands.get(name)) is not None:
                arguments[name] = operand
            elif (given := launch.inputs.get(name, name)) in _STEP_INPUTS:
                arguments[name] = Operand("input", given)
            elif name in _GROUP_INPUTS:
                arguments[name] = Operand("input", name, layer=group)
            elif name in ("count", "max_blocks"):
                arguments[name] = Value(kind, count if name == "count" else name)
            else:
                value = launch.values[name]
                arguments[name] = Value(kind, float(value) if kind == "fp32" else int(value))
        ranges = guard or launch.guard
        planned = PlannedLaunch(launch.kernel.name, len(self.launches), launch.grid, arguments, ranges)
        return replace(planned, collective=launch.collective)

    def _once(self, key: Hashable, make: Callable[[], tuple[Launch, ...]]) -> tuple[Launch, ...]:
        """Most layers have the same operators, and each has launches by the dozen."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    # -- one method for each operator of the graph ----------------------------------------------------------------

    def _RotaryTable(self, node: ir.Node) -> None:
        half = columns_of(node.outputs[0])
        cos, sin = (self._new(value, "f32", stride=half) for value in node.outputs)
        attributes: dict[str, Attribute] = {name: attribute(node, name) for name in node.attributes}
        table = rotary_table.RotaryTable(
            rot_dim=int(attributes["rot_dim"]),
            kind=str(attributes["kind"]),
            attention_factor=float(attributes["attention_factor"]),
            threshold=int(attributes["threshold"]),
            base=float(attributes["base"]),
            factor=float(attributes["factor"]),
        )
        frequencies = [*node.inputs[2:], None][:2]
        operands = {
            "inv_freq": self._vector(frequencies[0]),
            "inv_freq_long": self._vector(frequencies[1]),
            "cos": self._at(cos, "w"),
            "sin": self._at(sin, "w"),
        }
        self._launch(rotary_table.launches(table, architecture=self.arch), operands)

    def _Embedding(self, node: ir.Node) -> None:
        table, precision = node.inputs[1], str(attribute(node, "precision"))
        assert table is not None
        name, out = self.jobs.table(table, precision), self._new(node.outputs[0])
        launches = embedding.launches(
            hidden=out.columns,
            vocab=self.jobs.rows_of(name),
            vocab_start=attribute(node, "vocab_start"),
            scale=float(attribute(node, "scale")),
            table=_ACTIVATIONS[precision],
            architecture=self.arch,
        )
        scale = self._beside(f"{name}.scale")
        operands = {"table": self._weight(name), "table_scale": scale, "out": self._at(out, "w")}
        self._launch(launches, operands | {"drawn": DRAWN_TOKENS})

    def _RmsNorm(self, node: ir.Node) -> None:
        """A norm with the quantization behind it and, if one product alone reads it, that product."""
        quantize = next((user for user in users(node.outputs[0]) if is_ours(user, "Quantize")), None)
        if quantize is not None:
            assert len(users(node.outputs[0])) == 1, f"{node.name}: read both quantized and not"
        self._prepared(node, quantize)

    def _Quantize(self, node: ir.Node) -> None:
        if attribute(node, "precision") == "bf16":  # what activations are anyway
            self.views[node.outputs[0]] = self._view(node.inputs[0])
        else:
            self._prepared(None, node)

    def _prepared(self, norm: ir.Node | None, quantize: ir.Node | None) -> None:
        """A norm and a quantization (either may be missing), with the product that reads them."""
        last = quantize if quantize is not None else norm
        assert last is not None
        value = last.outputs[0]
        out = self._new(value, _ACTIVATIONS[str(attribute(quantize, "precision"))] if quantize is not None else "bf16")
        if norm is not None and len(norm.outputs) > 1:
            self._new(norm.outputs[1])
        readers, fused = users(value), 0
        product = readers[0] if len(readers) == 1 and is_ours(readers[0], "Linear") else None
        # A sum that others read too must be written by somebody: then the norm is launched for any step.
        simple = norm is None or (norm.inputs[1] is None and len(norm.outputs) == 1)
        if product is not None and simple:
            operator = self._product(product, "norm" if norm is not None else "quantize", norm)
            fused = linear.fused_rows(operator, self.arch)
        guard = (Range(out.rows, fused + 1, UNBOUNDED),) if fused else ()
        self._norm(norm, last, out, guard)
        if fused and product is not None:
            x, weight = (norm or last).inputs[0], norm.inputs[3] if norm is not None else None
            self._linear(product, operator, {"x": self._at(self._view(x), "r"), "norm_weight": self._vector(weight)})

    def _norm(self, norm: ir.Node | None, last: ir.Node, out: View, guard: tuple[Range, ...]) -> None:
        x, delta, post_weight, weight = norm.inputs if norm is not None else (last.inputs[0], None, None, None)
        total = self.views.get(norm.outputs[1]) if norm is not None and len(norm.outputs) > 1 else None
        operator = rms_norm.RmsNorm(
            hidden=out.columns,
            eps=float(attribute(norm, "eps")) if norm is not None else 0.0,
            out=out.dtype,
            delta=delta is not None,
            post_weight=post_weight is not None,
            weight=weight is not None,
            sum=total is not None,
            domain=out.rows,
        )
        operands = {
            "x": self._at(self._view(x), "r"),
            "delta": self._at(self._view(delta), "r") if delta is not None else None,
            "post_weight": self._vector(post_weight),
            "weight": self._vector(weight),
            "sum": self._at(total, "w") if total is not None else None,
            "out": self._at(out, "w"),
            "out_scale": self._scale(out, "w"),
        }
        self._launch(rms_norm.launches(operator, architecture=self.arch), operands, out.rows, guard)

    def _Linear(self, node: ir.Node) -> None:
        self._linear(node, self._product(node, None, None), {})

    def _product(self, node: ir.Node, prologue: str | None, norm: ir.Node | None) -> linear.Linear:
        _, _, bias, residual, *_ = [*node.inputs, None, None]
        value = node.outputs[0]
        return linear.Linear(
            n=columns_of(value),
            k=columns_of(self._inputs_of(node)),
            dtype=str(attribute(node, "precision")),
            domain=str(rows_of(value)),
            out_dtype="f32" if value.name == "logits" or is_part(value, "AllGather") else "bf16",
            activation=str(attribute(node, "activation")),
            softcap=float(attribute(node, "softcap", 0.0)),
            bias=bias is not None,
            residual=residual is not None,
            prologue=prologue,
            eps=float(attribute(norm, "eps")) if norm is not None else 0.0,
            invariant=self.options.batch_invariant,
        )

    def _inputs_of(self, node: ir.Node) -> ir.Value:
        assert node.inputs[0] is not None
        return node.inputs[0]

    def _linear(self, node: ir.Node, operator: linear.Linear, before: dict[str, Operand | None]) -> None:
        _, weight, bias, residual, *_ = [*node.inputs, None, None]
        assert weight is not None
        a, gated = self._view(node.inputs[0]), operator.gated
        out = self._new(node.outputs[0], operator.out_dtype)
        name = self.jobs.matrix(weight, operator.dtype, gated=gated)
        operands = before | {
            "a": self._at(a, "r"),
            "a_scale": self._scale(a, "r"),
            "weight": self._weight(name),
            "weight_scale": self._beside(f"{name}.scale"),
            "bias": self._weight(self.jobs.bias(bias, gated=gated)) if bias is not None else None,
            "residual": self._at(self._view(residual), "r") if residual is not None else None,
            "out": self._at(out, "w"),
        }
        num_sms = self.options.target.num_sms
        launches = self._once(operator, lambda: linear.linear_launches(operator, self.arch, num_sms))
        self._launch(launches, operands, operator.domain)

    def _Gather(self, node: ir.Node) -> None:
        """Rows of activations; attention reads those of positions and rotary tables through `rows` itself."""
        if all(is_ours(user, "PagedAttention") for user in users(node.outputs[0])):
            if node.inputs[0] in self.views:
                self.views[node.outputs[0]] = self._view(node.inputs[0])
            return
        x, out = self._view(node.inputs[0]), self._new(node.outputs[0])
        launches = gather_rows.launches(columns=out.columns, architecture=self.arch)
        self._launch(launches, {"x": self._at(x, "r"), "out": self._at(out, "w")})

    def _WriteKv(self, node: ir.Node) -> None:
        k, v, _, _, _, cos, sin, k_norm = node.inputs
        key, value, layer = self._view(k), self._view(v), attribute(node, "layer")
        assert (key.buffer, key.stride) == (value.buffer, value.stride)
        operator = kv_write.KvWrite(
            layout=self._layout(layer),
            k_offset=key.offset,
            v_offset=value.offset,
            stride=key.stride,
            rot_dim=attribute(node, "rot_dim"),
            eps=float(attribute(node, "eps")),
            has_norm=k_norm is not None,
        )
        operands = {
            "k": self._at(key, "r"),
            "v": self._at(value, "r"),
            "cos": self._at(self._view(cos), "r"),
            "sin": self._at(self._view(sin), "r"),
            "k_norm": self._vector(k_norm),
            **self._state(layer, "rw"),
        }
        self._launch(kv_write.kv_write_launches(operator, self.arch >= 90), operands, group=self._group(layer))

    def _PagedAttention(self, node: ir.Node) -> None:
        q, keys, _, _, _, _, cos, sin, q_norm = node.inputs
        writer = keys.producer() if keys is not None else None
        assert writer is not None, f"{node.name}: reads a cache that nobody writes"
        query, layer = self._view(q), attribute(writer, "layer")
        operator = attention.Attention(
            layout=self._layout(layer),
            num_heads=attribute(node, "num_heads"),
            q_offset=query.offset,
            stride=query.stride,
            rot_dim=attribute(node, "rot_dim"),
            eps=float(attribute(node, "eps")),
            scale=float(attribute(node, "scale")),
            softcap=float(attribute(node, "softcap")),
            window=attribute(node, "window"),
            has_norm=q_norm is not None,
            invariant=self.options.batch_invariant,
        )
        out = self._new(node.outputs[0])
        operands = {
            "q": self._at(query, "r"),
            "cos": self._at(self._view(cos), "r"),
            "sin": self._at(self._view(sin), "r"),
            "q_norm": self._vector(q_norm),
            "out": self._at(out, "w"),
            **self._state(layer, "r"),
        }
        pdl, key = self.arch >= 90, (operator, out.rows)
        launches = self._once(key, lambda: attention.attention_launches(operator, self.arch, out.rows, pdl))
        self._launch(launches, operands, group=self._group(layer))

    def _AllReduce(self, node: ir.Node) -> None:
        x, residual = [*node.inputs, None][:2]
        part, out = self._view(x), self._new(node.outputs[0])
        meeting, invariant = self.collectives.meeting(node), self.options.batch_invariant
        operator = all_reduce.AllReduce(out.columns, meeting, residual is not None, out.rows, invariant)
        operands = self.collectives.operands(node, part) | {
            "residual": self._at(self._view(residual), "r") if residual is not None else None,
            "out": self._at(out, "w"),
        }
        self._launch(all_reduce.launches(operator, architecture=self.arch), operands, out.rows)
        large = all_reduce.large_launches(operator, architecture=self.arch)
        if residual is None or not large:
            self._launch(large, operands, out.rows)
            return
        total = self._temporary(f"{out.buffer}.sum", out)
        self._launch(large, operands | {"out": self._at(total, "w")}, out.rows)
        self._add(self._view(residual), total, out, large[0].guard)

    def _temporary(self, name: str, like: View) -> View:
        self.buffers[name] = replace(self.buffers[like.buffer], name=name)
        return replace(like, buffer=name)

    def _add(self, x: View, delta: View, out: View, guard: tuple[Range, ...]) -> None:
        """By the kernel of norms, without a norm."""
        operator = rms_norm.RmsNorm(out.columns, eps=0.0, out="bf16", delta=True, weight=False, domain=out.rows)
        operands = {"x": self._at(x, "r"), "delta": self._at(delta, "r"), "out": self._at(out, "w")}
        self._launch(rms_norm.launches(operator, architecture=self.arch), operands, out.rows, guard)

    def _AllGather(self, node: ir.Node) -> None:
        part, out = self._view(node.inputs[0]), self._new(node.outputs[0], "f32")
        operator = all_gather.AllGather(tuple(attribute(node, "starts")), self.collectives.meeting(node), out.rows)
        operands = self.collectives.operands(node, part) | {"out": self._at(out, "w")}
        self._launch(all_gather.launches(operator, architecture=self.arch), operands, out.rows)

    def _layout(self, layer: int) -> kv_write.StateLayout:
        group = self.groups[self._group(layer)]
        return kv_write.StateLayout(group.num_kv_heads, group.head_dim, group.dtype, group.block_bytes)

    def _group(self, layer: int) -> int:
        name = group_name(self.config.windows[layer])
        return next(index for index, group in enumerate(self.groups) if group.name == name)

    def _state(self, layer: int, access: str) -> dict[str, Operand | None]:
        group = group_name(self.config.windows[layer])
        state = Operand("state", group, 0, 0, access, layer_in_group(self.config, layer))
        return {"state": state, "state_scales": state}


def lower_to_cuda(g: GraphBuilder, config: Config, options: Options) -> tuple[Plan, TensorJobs, Choice]:
    """The plan of this rank, how each of its tensors is made, and its kernels, with those that may take their place."""
    jobs = TensorJobs(CUDA_LAYOUTS)
    lowering = CudaLowering(g, config, options, jobs)
    plan = lowering.lower()
    return plan, jobs, Choice(tuple(lowering.ways.values()), lowering.others)
