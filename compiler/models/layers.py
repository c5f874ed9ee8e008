"""What the decoders have in common, each as a paper would say it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ...engines.errors import CheckpointError, faults
from ..checkpoint.tensors import ELEMENT_BYTES, Checkpoint
from ..checkpoint.weights import Part, Weight
from ..graph.builder import DOMAIN, Dimension, GraphBuilder, rows_of
from .config import Config
from .rope import Rope


@dataclass(frozen=True)
class Tensors:
    """The checkpoint's tensors under a prefix. Asking says what shape is wanted; faults are collected for `finish`."""

    checkpoint: Checkpoint
    prefix: str = ""
    used: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)

    def under(self, name: str) -> Tensors:
        """The tensors whose names go on with `name`."""
        return Tensors(self.checkpoint, f"{self.prefix}{name}.", self.used, self.reasons)

    def has(self, name: str) -> bool:
        """True if the checkpoint stores it."""
        return self.prefix + name in self.checkpoint.tensors

    def get(self, name: str, *shape: int) -> Weight:
        """The weight called `name`, which must be of `shape`."""
        full = self.prefix + name
        self.used.add(full)
        tensor = self.checkpoint.tensors.get(full)
        if tensor is None:
            self.reasons.append(f"{full} {list(shape)}: missing")
        elif tensor.shape != shape:
            self.reasons.append(f"{full}: config.json makes it {list(shape)}, the checkpoint has {list(tensor.shape)}")
        elif tensor.dtype not in ELEMENT_BYTES:
            self.reasons.append(f"{full}: stored as {tensor.dtype}; implemented are {', '.join(ELEMENT_BYTES)}")
        part = Part(full, (0, shape[0]), (0, shape[1] if len(shape) > 1 else 1))
        return Weight(self.checkpoint, (part,), vector=len(shape) == 1)

    def finish(self) -> None:
        """Raises CheckpointError with everything missing, misshapen or left over."""
        left = [
            name
            for name in self.checkpoint.tensors
            if name not in self.used and not name.endswith("rotary_emb.inv_freq")
        ]
        shown = ", ".join(sorted(left)[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        reasons = self.reasons + ([f"config.json has no use for {shown}"] if left else [])
        if reasons:
            raise faults(CheckpointError, f"{self.checkpoint.directory}: tensors do not fit config.json", reasons)


@dataclass(frozen=True)
class Inputs:
    """What every step brings. tables: cos and sin of each rope; slots and block_tables: of each window."""

    positions: ir.Value
    token_sequence: ir.Value
    rows: ir.Value
    tables: list[tuple[ir.Value, ir.Value]]
    slots: dict[int, ir.Value]
    block_tables: dict[int, ir.Value]


def step_inputs(g: GraphBuilder, cfg: Config) -> tuple[ir.Value, Inputs]:
    """Declares the inputs of a step; returns token ids and the others."""
    integer = ir.DataType.INT64
    token_ids = g.input("token_ids", ["tokens"], integer)
    positions = g.input("positions", ["tokens"], integer)
    token_sequence = g.input("token_sequence", ["tokens"], integer)
    prompt_lengths = g.input("prompt_lengths", ["tokens"], integer)
    rows = g.input("rows", ["rows"], integer)
    windows = sorted(set(cfg.windows))
    slots = {window: g.input(f"slots.{group_name(window)}", ["tokens"], integer) for window in windows}
    block_tables = {
        window: g.input(f"block_table.{group_name(window)}", ["sequences", "max_blocks"], integer) for window in windows
    }
    tables = [rotary_table(g, positions, prompt_lengths, rope, index) for index, rope in enumerate(cfg.rope_tables)]
    return token_ids, Inputs(positions, token_sequence, rows, tables, slots, block_tables)


def group_name(window: int) -> str:
    """State groups are named by what their layers see."""
    return f"window{window}" if window else "full"


def rotary_table(
    g: GraphBuilder, positions: ir.Value, prompt_lengths: ir.Value, rope: Rope, index: int
) -> tuple[ir.Value, ir.Value]:
    """cos and sin [tokens, rotary_dim / 2] of a step's positions."""
    inputs = [
        positions,
        prompt_lengths,
        g.constant(f"rope.{index}.frequencies", np.array(rope.frequencies, np.float32)),
    ]
    if rope.long_frequencies:
        inputs.append(g.constant(f"rope.{index}.long_frequencies", np.array(rope.long_frequencies, np.float32)))
    columns: list[Dimension] = ["tokens", rope.rotary_dim // 2]
    shape = (columns, ir.DataType.FLOAT)
    cos, sin = g.multi(
        "RotaryTable",
        inputs,
        [shape, shape],
        f"rope.{index}",
        DOMAIN,
        kind=rope.kind,
        rot_dim=rope.rotary_dim,
        attention_factor=rope.attention_factor,
        threshold=rope.threshold,
        base=rope.base,
        factor=rope.factor,
    )
    return cos, sin


def embed(g: GraphBuilder, token_ids: ir.Value, w: Tensors, cfg: Config) -> ir.Value:
    """Token embeddings: [tokens] -> [tokens, hidden]."""
    return g.gather(g.weight(w.get("embed_tokens.weight", cfg.vocab_size, cfg.hidden_size)), token_ids, "embed_tokens")


def projections(w: Tensors, cfg: Config) -> tuple[list[Weight], list[Weight | None]]:
    """Weights and biases of q, k and v, each a tensor of its own."""
    sizes = {"q_proj": cfg.num_heads, "k_proj": cfg.num_kv_heads, "v_proj": cfg.num_kv_heads}
    weights = [w.get(f"{name}.weight", heads * cfg.head_dim, cfg.hidden_size) for name, heads in sizes.items()]
    biases = [w.get(f"{n}.bias", h * cfg.head_dim) if cfg.attention_bias else None for n, h in sizes.items()]
    return weights, biases


def attention(
    g: GraphBuilder,
    h: ir.Value,
    qkv: tuple[list[Weight], list[Weight | None]],
    w: Tensors,
    cfg: Config,
    inputs: Inputs,
    layer: int,
    head_norms: tuple[ir.Value | Weight, ir.Value | Weight] | None = None,
) -> ir.Value:
    """Causal attention with grouped queries (Ainslie et al., GQA, 2023), cache paged: [tokens, hidden] -> the same."""
    q, k, v = (
        g.linear(h, weight, bias, n) for weight, bias, n in zip(*qkv, ("q_proj", "k_proj", "v_proj"), strict=True)
    )
    if head_norms is not None:
        q = g.head_norm(q, head_norms[0], cfg.rms_norm_eps, cfg.head_dim, "q_norm")
        k = g.head_norm(k, head_norms[1], cfg.rms_norm_eps, cfg.head_dim, "k_norm")
    table, window = inputs.tables[cfg.ropes[layer]], cfg.windows[layer]
    rotary_dim = cfg.rope_tables[cfg.ropes[layer]].rotary_dim
    q = g.rotate(q, table, cfg.num_heads, rotary_dim, "q_rotary")
    k = g.rotate(k, table, cfg.num_kv_heads, rotary_dim, "k_rotary")
    keys, values = write_kv(g, k, v, cfg, inputs, layer)
    out = g.op(
        "PagedAttention",
        [q, keys, values, inputs.block_tables[window], inputs.positions, inputs.token_sequence],
        [rows_of(q), cfg.num_heads * cfg.head_dim],
        "attention",
        DOMAIN,
        num_heads=cfg.num_heads,
        num_kv_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        scale=cfg.scale,
        softcap=cfg.attention_softcap,
        window=window,
    )
    bias = w.get("o_proj.bias", cfg.hidden_size) if cfg.output_bias else None
    return g.linear(out, w.get("o_proj.weight", cfg.hidden_size, cfg.num_heads * cfg.head_dim), bias, "o_proj")


def write_kv(
    g: GraphBuilder, k: ir.Value, v: ir.Value, cfg: Config, inputs: Inputs, layer: int
) -> tuple[ir.Value, ir.Value]:
    """Stores keys and values of the step's tokens in the layer's cache, and returns the cache."""
    shape: list[Dimension] = ["blocks", "block_size", cfg.num_kv_heads, cfg.head_dim]
    caches = [g.input(f"{name}_cache.{layer}", shape) for name in "kv"]
    window = cfg.windows[layer]
    outputs = [(shape, ir.DataType.FLOAT)] * 2
    keys, values = g.multi(
        "WriteKv",
        [k, v, *caches, inputs.slots[window]],
        outputs,
        "write_kv",
        DOMAIN,
        layer=layer,
        window=window,
        head_dim=cfg.head_dim,
    )
    g.output(keys, f"k_cache.{layer}.next")
    g.output(values, f"v_cache.{layer}.next")
    return keys, values


def gated_mlp(g: GraphBuilder, h: ir.Value, gate_up: tuple[Weight, Weight], w: Tensors, cfg: Config) -> ir.Value:
    """down(activation(gate(h)) · up(h)) (Shazeer, GLU variants, 2020): [tokens, hidden] -> the same."""
    biases = [w.get(f"{n}_proj.bias", cfg.intermediate_size) if cfg.mlp_bias else None for n in ("gate", "up")]
    gate = g.activate(g.linear(h, gate_up[0], biases[0], "gate_proj"), cfg.activation)
    up = g.linear(h, gate_up[1], biases[1], "up_proj")
    bias = w.get("down_proj.bias", cfg.hidden_size) if cfg.mlp_bias else None
    weight = w.get("down_proj.weight", cfg.hidden_size, cfg.intermediate_size)
    return g.linear(g.multiply(gate, up, "gated"), weight, bias, "down_proj")


def gate_and_up(w: Tensors, cfg: Config) -> tuple[Weight, Weight]:
    """The gate's and the up projection's weights, each a tensor of its own."""
    shape = (cfg.intermediate_size, cfg.hidden_size)
    return w.get("gate_proj.weight", *shape), w.get("up_proj.weight", *shape)


def head(
    g: GraphBuilder, x: ir.Value, w: Tensors, inner: Tensors, cfg: Config, inputs: Inputs, norm: ir.Value | Weight
) -> None:
    """Final norm and vocabulary projection of the rows asked for: the graph's output `logits` [rows, vocab]."""
    x = g.rms_norm(g.gather(x, inputs.rows, "sampled"), norm, cfg.rms_norm_eps, "final_norm")
    shape = (cfg.vocab_size, cfg.hidden_size)
    if cfg.tied:
        weight = inner.get("embed_tokens.weight", *shape)
        w.used.add("lm_head.weight")
    else:
        weight = w.get("lm_head.weight", *shape)
    logits = g.linear(x, weight, name="lm_head")
    g.output(g.softcap(logits, cfg.logits_softcap) if cfg.logits_softcap else logits, "logits")
