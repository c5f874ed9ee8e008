"""Gemma 3's text model (Gemma Team, 2025): alternating windows with a rope each, norms before and after every block,
norms that multiply by 1 + weight, scaled embeddings, and soft-capping where configured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ..checkpoint.weights import Weight
from ..graph.builder import GraphBuilder
from .config import Config
from .layers import Inputs, Tensors, attention, embed, gate_and_up, gated_mlp, head, projections, step_inputs
from .llama import decoder_config
from .reader import ConfigReader, layer_windows

_LAYER_TYPES = ("full_attention", "sliding_attention")


def read_config(reader: ConfigReader) -> Config:
    """What config.json of a gemma3_text says."""
    reader.only("use_bidirectional_attention", False)
    num_layers = reader.num_layers()
    pattern = reader.integer("sliding_window_pattern", reader.integer("_sliding_window_pattern", 6))
    window = reader.integer("sliding_window", 4096)
    windows = layer_windows(reader, num_layers, window, [bool((layer + 1) % pattern) for layer in range(num_layers)])
    _spell_ropes_by_layer_type(reader)
    reader.raw.setdefault("tie_word_embeddings", True)
    reader.raw["hidden_act"] = reader.value("hidden_activation", reader.value("hidden_act", "gelu_pytorch_tanh"))
    bias = reader.flag("attention_bias")
    cfg = decoder_config(reader, windows, kv_default=4, head_dim_default=256, attention_bias=bias, output_bias=bias)
    return replace(
        cfg,
        max_model_len=reader.integer("max_position_embeddings"),
        scale=reader.number("query_pre_attn_scalar", 256.0, above=0.0) ** -0.5,
        attention_softcap=reader.number("attn_logit_softcapping", 0.0),
        logits_softcap=reader.number("final_logit_softcapping", 0.0),
    )


def _spell_ropes_by_layer_type(reader: ConfigReader) -> None:
    """transformers 4 has rope_theta and rope_scaling for full attention and rope_local_base_freq for windows."""
    theta, local = reader.number("rope_theta", 1_000_000.0), reader.number("rope_local_base_freq", 10_000.0)
    parameters = _object(reader, "rope_parameters", reader.value("rope_parameters"))
    full, sliding = (_object(reader, "rope_parameters", parameters.get(kind)) for kind in _LAYER_TYPES)
    scaling = _object(reader, "rope_scaling", reader.value("rope_scaling"))
    reader.raw["rope_parameters"] = parameters | {
        "full_attention": {"rope_theta": theta} | full | scaling,
        "sliding_attention": {"rope_theta": local} | sliding,
    }
    reader.raw["rope_scaling"] = None


def _object(reader: ConfigReader, key: str, found: object) -> dict[str, Any]:
    if found is None or isinstance(found, dict):
        return found or {}
    reader.refuse(key, "wanted an object")
    return {}


def build(g: GraphBuilder, w: Tensors, cfg: Config) -> None:
    """The whole decoder: step inputs to logits."""
    inner = w.under("model")
    token_ids, inputs = step_inputs(g, cfg)
    # transformers keeps the factor in float32.
    x = g.multiply(embed(g, token_ids, inner, cfg), g.scalar(float(np.float32(cfg.hidden_size**0.5))), "embed_scale")
    for layer in range(cfg.num_layers):
        with g.scope(f"layers.{layer}"):
            x = decoder_layer(g, x, inner.under(f"layers.{layer}"), cfg, inputs, layer)
    head(g, x, w, inner, cfg, inputs, one_plus(g, inner.get("norm.weight", cfg.hidden_size)))


def decoder_layer(g: GraphBuilder, x: ir.Value, w: Tensors, cfg: Config, inputs: Inputs, layer: int) -> ir.Value:
    """One decoder layer: [tokens, hidden] -> [tokens, hidden]."""
    attn, mlp = w.under("self_attn"), w.under("mlp")
    head_norms = (
        one_plus(g, attn.get("q_norm.weight", cfg.head_dim)),
        one_plus(g, attn.get("k_norm.weight", cfg.head_dim)),
    )

    def norm(value: ir.Value, name: str) -> ir.Value:
        return g.rms_norm(value, one_plus(g, w.get(f"{name}.weight", cfg.hidden_size)), cfg.rms_norm_eps, name)

    h = attention(g, norm(x, "input_layernorm"), projections(attn, cfg), attn, cfg, inputs, layer, head_norms)
    x = g.add(x, norm(h, "post_attention_layernorm"), "attention_residual")
    h = gated_mlp(g, norm(x, "pre_feedforward_layernorm"), gate_and_up(mlp, cfg), mlp, cfg)
    return g.add(x, norm(h, "post_feedforward_layernorm"), "mlp_residual")


def one_plus(g: GraphBuilder, weight: Weight) -> ir.Value:
    """1 + weight; the pass fold_constants makes it part of the weight."""
    return g.add(g.weight(weight), g.scalar(1.0), f"one_plus.{weight.parts[0].tensor}")
