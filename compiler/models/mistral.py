"""Mistral (Jiang et al., 2023): Llama whose layers all see a sliding window, where the config has one."""

from __future__ import annotations

from .config import Config, ConfigReader
from .llama import build as build
from .llama import decoder_config


def read_config(reader: ConfigReader) -> Config:
    """What config.json of a mistral says."""
    # transformers' default is 4096, but only for a config without the key: null means no window.
    window = (
        reader.integer("sliding_window")
        if reader.value("sliding_window", 0 if "sliding_window" in reader.raw else 4096)
        else 0
    )
    if "sliding_window" not in reader.raw:
        window = 4096
    if (types := reader.value("layer_types")) is not None and set(types) != {
        "sliding_attention" if window else "full_attention"
    }:
        reader.refuse(
            "layer_types", "mistral's layers are all alike; alternating ones are another architecture (ministral)"
        )
    reader.only("attention_bias", False)
    return decoder_config(reader, (window,) * reader.integer("num_hidden_layers"), kv_default=8)
