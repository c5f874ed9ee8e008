"""The shapes that kernels are tested and measured at: of real models on a GPU, small ones in the interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .launcher import DEVICE, INTERPRETED


@dataclass(frozen=True)
class Model:
    """Of an architecture without biases but those of q, k and v."""

    hidden: int
    inner: int
    vocab: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def query(self) -> int:
        """Columns of all heads."""
        return self.num_heads * self.head_dim

    @property
    def qkv(self) -> int:
        """Rows of the weight that makes q, k and v."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


LLAMA_8B = Model(4096, 14336, 128256, 32, 8, 128)
QWEN_05B = Model(896, 4864, 151936, 14, 2, 64)
MODELS = {"llama-3.1-8b": LLAMA_8B, "qwen2.5-0.5b": QWEN_05B}
if INTERPRETED:
    # K of the down projection is long enough to be split.
    MODELS = {"small": Model(160, 2304, 700, 4, 2, 16)}


def generator(seed: int) -> torch.Generator:
    """Random numbers of the device."""
    return torch.Generator(DEVICE).manual_seed(seed)


def normal(random: torch.Generator, *shape: int) -> torch.Tensor:
    """f32 of the standard normal distribution."""
    return torch.randn(shape, generator=random, device=DEVICE)


def padded(columns: int) -> int:
    """Elements of a row of as many columns."""
    return -(-columns // 128) * 128
