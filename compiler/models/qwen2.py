"""Qwen2 and Qwen2.5 (Yang et al., 2024): Llama with biases on q, k and v."""

from __future__ import annotations

from .config import Config
from .llama import build as build
from .llama import decoder_config
from .reader import ConfigReader, layer_windows


def read_config(reader: ConfigReader) -> Config:
    """What config.json of a qwen2 says."""
    reader.only("use_mrope", False)
    return decoder_config(reader, upper_layers_slide(reader), kv_default=32, attention_bias=True)


def upper_layers_slide(reader: ConfigReader) -> tuple[int, ...]:
    """Windows of Qwen's layers: with use_sliding_window, those from max_window_layers up have one."""
    num_layers = reader.num_layers()
    first = reader.integer("max_window_layers", 28, least=0)
    windowed = reader.flag("use_sliding_window") and reader.raw.get("sliding_window", 4096) is not None
    window = reader.integer("sliding_window", 4096) if windowed else None
    reader.value("sliding_window")
    return layer_windows(reader, num_layers, window, [windowed and layer >= first for layer in range(num_layers)])
