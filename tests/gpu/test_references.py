"""torch's side of the comparisons against the plugins' NumPy references, at small sizes and without a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from enginery.plugins.attention.reference import attention
from enginery.plugins.linear import reference
from enginery.plugins.linear.cuda import Linear

from . import paged, products, shapes
from .paged import Heads, Scene
from .products import Product


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (paged, products, shapes):
        monkeypatch.setattr(module, "DEVICE", "cpu")


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "residual": True},
        {"activation": "silu_gated"},
        {"activation": "gelu_tanh_gated", "bias": True},
    ],
    ids=str,
)
def test_products(dtype: str, options: dict[str, object]) -> None:
    linear = Linear(40, 70, dtype, softcap=3.0, **options)  # type: ignore[arg-type]
    product = Product(linear, 5)
    weight, bias = product.weight.numpy(), product.operands["bias"].numpy() if linear.bias else None
    gate, up = (slice(0, 80, 2), slice(1, 80, 2)) if linear.gated else (slice(0, 40), slice(0, 0))
    wanted = reference.linear(
        product.a.numpy(),
        weight[gate],
        None if bias is None else bias[gate],
        product.operands["residual"][:, :40].float().numpy() if linear.residual else None,
        up_weight=weight[up],
        up_bias=None if bias is None else bias[up],
        activation=linear.activation,
        softcap=linear.softcap,
    )
    np.testing.assert_allclose(product.wanted().numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_dtype", paged.KV_DTYPES)
@pytest.mark.parametrize(
    "heads", [Heads(4, 2, 16, 8), Heads(2, 1, 24, 24, True, 30), Heads(3, 3, 8, softcap=5.0)], ids=str
)
def test_attention(kv_dtype: str, heads: Heads) -> None:
    scene = Scene(kv_dtype, heads, [(70, 7), (150, 1), (5, 5)])
    blocks = torch.arange(len(scene.cache.bytes))
    shape = (len(blocks), 64, heads.num_kv_heads, heads.head_dim)
    keys, values = (part.reshape(shape).numpy() for part in scene.cache.unpacked(0, blocks))
    wanted = attention(
        scene.q[:, : heads.num_heads * heads.head_dim].float().numpy(),
        keys,
        values,
        scene.table.numpy(),
        scene.positions.numpy(),
        scene.sequence.numpy(),
        scene.cos.numpy() if heads.rot_dim else None,
        scene.sin.numpy() if heads.rot_dim else None,
        scene.q_norm.numpy() if scene.q_norm is not None else None,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        scale=scene.operator.scale,
        softcap=heads.softcap,
        window=heads.window,
        rot_dim=heads.rot_dim,
        eps=scene.operator.eps,
    )
    np.testing.assert_allclose(scene.wanted().numpy(), wanted, rtol=1e-4, atol=1e-4)
