"""Qwen2 and Qwen2.5 (Yang et al., 2024): Llama with biases on q, k and v."""

from __future__ import annotations

from .config import Config, ConfigReader, layer_windows
from .llama import build as build
from .llama import decoder_config


def read_config(reader: ConfigReader) -> Config:
    """What config.json of a qwen2 says."""
    reader.only("use_mrope", False)
    return decoder_config(reader, upper_layers_slide(reader), kv_default=32, attention_bias=True)


def upper_layers_slide(reader: ConfigReader) -> tuple[int, ...]:
    """Windows of Qwen's layers: with use_sliding_window, those from max_window_layers up have one."""
    num_layers = reader.integer("num_hidden_layers")
    slides = reader.flag("use_sliding_window")
    window = reader.value("sliding_window", None if "sliding_window" in reader.raw else 4096) if slides else None
    if window is not None:
        window = reader.integer("sliding_window", 4096)
    first = reader.integer("max_window_layers", 28, least=0)
    return layer_windows(
        reader, num_layers, window, [window is not None and layer >= first for layer in range(num_layers)]
    )
