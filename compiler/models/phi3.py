"""Phi-3, Phi-3.5, Phi-4-mini (Abdin et al., 2024): Llama with q, k, v in one tensor, gate, up in one, and LongRoPE."""

from __future__ import annotations

import onnx_ir as ir

from ..checkpoint.weights import Weight
from ..graph.builder import GraphBuilder
from .config import Config
from .layers import Inputs, Tensors, attention, embed, gated_mlp, head, step_inputs
from .llama import decoder_config
from .reader import ConfigReader


def read_config(reader: ConfigReader) -> Config:
    """What config.json of a phi3 says."""
    for name in ("rope_parameters", "rope_scaling"):
        scaling = reader.raw.get(name)
        if isinstance(scaling, dict):  # transformers reads the names of early releases as longrope
            kind = scaling.get("rope_type", scaling.get("type"))
            reader.raw[name] = scaling | {"rope_type": "longrope" if kind in ("su", "yarn") else kind or "default"}
    window = reader.value("sliding_window")
    window = reader.integer("sliding_window") if window is not None else 0
    return decoder_config(reader, (window,) * reader.num_layers())


def build(g: GraphBuilder, w: Tensors, cfg: Config) -> None:
    """The whole decoder: step inputs to logits."""
    inner = w.under("model")
    token_ids, inputs = step_inputs(g, cfg)
    x = embed(g, token_ids, inner, cfg)
    for layer in range(cfg.num_layers):
        with g.scope(f"layers.{layer}"):
            x = decoder_layer(g, x, inner.under(f"layers.{layer}"), cfg, inputs, layer)
    head(g, x, w, inner, cfg, inputs, inner.get("norm.weight", cfg.hidden_size))


def decoder_layer(g: GraphBuilder, x: ir.Value, w: Tensors, cfg: Config, inputs: Inputs, layer: int) -> ir.Value:
    """One decoder layer: [tokens, hidden] -> [tokens, hidden]."""
    attn, mlp = w.under("self_attn"), w.under("mlp")
    qkv = split_rows(
        attn, "qkv_proj.weight", [h * cfg.head_dim for h in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)], cfg
    )
    gate, up = split_rows(mlp, "gate_up_proj.weight", [cfg.intermediate_size] * 2, cfg)
    h = g.rms_norm(x, w.get("input_layernorm.weight", cfg.hidden_size), cfg.rms_norm_eps, "input_layernorm")
    x = g.add(x, attention(g, h, (qkv, [None] * 3), attn, cfg, inputs, layer), "attention_residual")
    h = g.rms_norm(
        x, w.get("post_attention_layernorm.weight", cfg.hidden_size), cfg.rms_norm_eps, "post_attention_layernorm"
    )
    return g.add(x, gated_mlp(g, h, (gate, up), mlp, cfg), "mlp_residual")


def split_rows(w: Tensors, name: str, sizes: list[int], cfg: Config) -> list[Weight]:
    """Consecutive rows of one stored tensor, as weights of their own; the pass fuse_qkv puts them together again."""
    whole, start, pieces = w.get(name, sum(sizes), cfg.hidden_size), 0, []
    for size in sizes:
        pieces.append(whole.take_rows(start, start + size))
        start += size
    return pieces
