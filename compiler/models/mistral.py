"""Mistral (Jiang et al., 2023): Llama whose layers all see a sliding window, where the config has one."""

from __future__ import annotations

from .config import Config
from .llama import build as build
from .llama import decoder_config
from .reader import ConfigReader


def read_config(reader: ConfigReader) -> Config:
    """What config.json of a mistral says."""
    # null means no window; a config without the key means transformers' default.
    windowed = reader.raw.get("sliding_window", 4096) is not None
    window = reader.integer("sliding_window", 4096) if windowed else 0
    kind = "sliding_attention" if windowed else "full_attention"
    types = reader.value("layer_types", [kind])
    if not isinstance(types, list) or any(found != kind for found in types):
        reader.refuse("layer_types", "mistral's layers are all alike; alternating ones are another architecture")
    reader.only("attention_bias", False)
    return decoder_config(reader, (window,) * reader.num_layers(), kv_default=8)
