"""A decoder's configuration, read the same from both of transformers' spellings (reader.py)."""

from __future__ import annotations

from dataclasses import dataclass

from .rope import Rope


@dataclass(frozen=True)
class Config:
    """A decoder-only language model, as its layers need to know it.

    windows  of each layer: a token sees itself and window - 1 tokens before it; 0 sees all
    ropes    of each layer, an index into `rope_tables`
    scale    of attention scores; softcaps are 0 where there are none
    max_model_len  the longest sequence the model is made for, rope scaling counted
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str
    rms_norm_eps: float
    tied: bool
    max_model_len: int
    windows: tuple[int, ...]
    ropes: tuple[int, ...]
    rope_tables: tuple[Rope, ...]
    scale: float
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_softcap: float = 0.0
    logits_softcap: float = 0.0
