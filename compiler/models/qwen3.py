"""Qwen3 (Yang et al., 2025): Llama with a norm on every query and key head, and a head size of its own."""

from __future__ import annotations

from ..graph.builder import GraphBuilder
from .config import Config
from .layers import Tensors
from .llama import build as build_decoder
from .llama import decoder_config
from .qwen2 import upper_layers_slide
from .reader import ConfigReader


def read_config(reader: ConfigReader) -> Config:
    """What config.json of a qwen3 says."""
    bias = reader.flag("attention_bias")
    windows = upper_layers_slide(reader)
    return decoder_config(reader, windows, kv_default=32, head_dim_default=128, attention_bias=bias, output_bias=bias)


def build(g: GraphBuilder, w: Tensors, cfg: Config) -> None:
    """The whole decoder: step inputs to logits."""
    build_decoder(g, w, cfg, head_norms=True)
