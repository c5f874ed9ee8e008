"""Llama (Touvron et al., 2023; Dubey et al., The Llama 3 Herd of Models, 2024). Also the shape of its relatives."""

from __future__ import annotations

import onnx_ir as ir

from ..graph.builder import GraphBuilder
from .config import Config
from .layers import Inputs, Tensors, attention, embed, gate_and_up, gated_mlp, head, projections, step_inputs
from .reader import ConfigReader, head_geometry
from .rope import read_ropes


def read_config(reader: ConfigReader) -> Config:
    """What config.json of a llama says."""
    reader.only("pretraining_tp", 1)
    bias = reader.flag("attention_bias")
    windows = (0,) * reader.num_layers()
    return decoder_config(reader, windows, attention_bias=bias, output_bias=bias, mlp_bias=reader.flag("mlp_bias"))


def decoder_config(
    reader: ConfigReader,
    windows: tuple[int, ...],
    kv_default: int | None = None,
    head_dim_default: int | None = None,
    attention_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
) -> Config:
    """The keys that llama shares with its relatives."""
    heads, kv_heads, head_dim = head_geometry(reader, kv_default, head_dim_default)
    ropes, tables = read_ropes(reader, head_dim, windows)
    reach = min(table.reach for table in tables)
    return Config(
        model_type=str(reader.value("model_type")),
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        intermediate_size=reader.integer("intermediate_size"),
        num_layers=len(windows),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        activation=reader.activation("hidden_act", "silu"),
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        tied=reader.flag("tie_word_embeddings"),
        max_model_len=int(reader.integer("max_position_embeddings") * reach),
        windows=windows,
        ropes=ropes,
        rope_tables=tables,
        scale=head_dim**-0.5,
        attention_bias=attention_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
    )


def build(g: GraphBuilder, w: Tensors, cfg: Config, head_norms: bool = False) -> None:
    """The whole decoder: step inputs to logits."""
    inner = w.under("model")
    token_ids, inputs = step_inputs(g, cfg)
    x = embed(g, token_ids, inner, cfg)
    for layer in range(cfg.num_layers):
        with g.scope(f"layers.{layer}"):
            x = decoder_layer(g, x, inner.under(f"layers.{layer}"), cfg, inputs, layer, head_norms)
    head(g, x, w, inner, cfg, inputs, inner.get("norm.weight", cfg.hidden_size))


def decoder_layer(
    g: GraphBuilder, x: ir.Value, w: Tensors, cfg: Config, inputs: Inputs, layer: int, head_norms: bool
) -> ir.Value:
    """One decoder layer: [tokens, hidden] -> [tokens, hidden]."""
    attn, mlp = w.under("self_attn"), w.under("mlp")
    norms = (attn.get("q_norm.weight", cfg.head_dim), attn.get("k_norm.weight", cfg.head_dim)) if head_norms else None
    h = g.rms_norm(x, w.get("input_layernorm.weight", cfg.hidden_size), cfg.rms_norm_eps, "input_layernorm")
    x = g.add(x, attention(g, h, projections(attn, cfg), attn, cfg, inputs, layer, norms), "attention_residual")
    h = g.rms_norm(
        x, w.get("post_attention_layernorm.weight", cfg.hidden_size), cfg.rms_norm_eps, "post_attention_layernorm"
    )
    return g.add(x, gated_mlp(g, h, gate_and_up(mlp, cfg), mlp, cfg), "mlp_residual")
