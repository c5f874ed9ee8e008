"""linear: a product with its epilogue."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def linear(
    a: Array,
    weight: Array,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    up_weight: Array | None = None,
    up_bias: Array | None = None,
    activation: str = "none",
    softcap: float = 0.0,
) -> Array:
    """f32 [M, K] · [N, K]ᵀ -> f32 [M, N], summed in float64.

    activation  "none", or "silu_gated" and "gelu_tanh_gated": act(a · weightᵀ + bias) · (a · up_weightᵀ + up_bias)
    softcap     0, or the bound of softcap · tanh(x / softcap)
    """
    out = _product(a, weight, bias)
    if activation != "none":
        assert up_weight is not None
        out = _ACTIVATIONS[activation](out) * _product(a, up_weight, up_bias)
    if softcap:
        out = softcap * np.tanh(out / softcap)
    if residual is not None:
        out = out + residual
    return out.astype(np.float32)


def _product(a: Array, weight: Array, bias: Array | None) -> Array:
    out: Array = a.astype(np.float64) @ weight.astype(np.float64).T
    return out if bias is None else out + bias


def _silu(x: Array) -> Array:
    out: Array = x / (1 + np.exp(-x))
    return out


def _gelu_tanh(x: Array) -> Array:
    out: Array = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return out


_ACTIVATIONS = {"silu_gated": _silu, "gelu_tanh_gated": _gelu_tanh}
