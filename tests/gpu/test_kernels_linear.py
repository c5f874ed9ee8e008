"""Products at the shapes of real models, of every tile of the tuning table, against torch in float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from enginery.plugins.launches import Kernel
from enginery.plugins.linear.cuda import Linear

from .launcher import INTERPRETED
from .products import Product, kernel_of
from .shapes import MODELS, Model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

DTYPES = ("bf16", "fp8", "int8")
# One for each range of rows that has its own tile, with tails.
ROWS = (1, 4, 5, 16, 17, 64, 100, 300, 1000, 2048) if not INTERPRETED else (1, 3, 20, 70)
# Of the whole result: deviation, and the largest one anywhere, in units of the result's deviation. sm_90 sums products
# of fp8 in less than float32, cuBLASLt's fast accumulation too.
BOUNDS = {"bf16": (4e-3, 0.04), "fp8": (2e-2, 0.2), "int8": (4e-3, 0.04)}


def linears(model: Model, dtype: str) -> dict[str, Linear]:
    """The products of a layer and of the head, with what is fused into them."""
    return {
        "qkv": Linear(model.qkv, model.hidden, dtype, bias=True, prologue="norm", eps=1e-5),
        "o": Linear(model.hidden, model.query, dtype, residual=True, prologue="quantize"),
        "gate_up": Linear(model.inner, model.hidden, dtype, activation="silu_gated", prologue="norm", eps=1e-5),
        "down": Linear(model.hidden, model.inner, dtype, residual=True, prologue="quantize"),
        "head": Linear(model.vocab, model.hidden, dtype, domain="rows", out_dtype="f32", softcap=30.0),
    }


def cases() -> Iterator[tuple[str, str, str, int]]:
    for name in MODELS:
        for dtype in DTYPES:
            for product in ("qkv", "o", "gate_up", "down", "head"):
                for rows in ROWS:
                    if product != "head" or rows in (*ROWS[:2], 64, 70):
                        yield name, dtype, product, rows


def kernels() -> Iterator[Kernel]:
    for name, dtype, product, rows in cases():
        yield kernel_of(linears(MODELS[name], dtype)[product], rows).kernel
    for model in MODELS.values():
        for dtype in DTYPES:
            yield kernel_of(invariant_of(model, dtype), 1).kernel


def invariant_of(model: Model, dtype: str) -> Linear:
    return Linear(model.hidden, model.inner, dtype, residual=True, invariant=True)


def check(product: Product) -> None:
    found, wanted = product.run(), product.wanted()
    assert torch.isfinite(found).all()
    reach = wanted.std()
    overall, anywhere = BOUNDS[product.linear.dtype]
    error = found - wanted
    assert error.std() <= overall * reach
    assert (error.abs() <= anywhere * reach + 2**-7 * wanted.abs()).all()


@pytest.mark.parametrize(("name", "dtype", "product", "rows"), list(cases()))
def test_products(name: str, dtype: str, product: str, rows: int) -> None:
    check(Product(linears(MODELS[name], dtype)[product], rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_products_do_not_depend_on_who_ends_last(dtype: str) -> None:
    """Programs arrive in another order each time; what they leave is summed in the order of K."""
    model = next(iter(MODELS.values()))
    product = Product(linears(model, dtype)["down"], 1)
    first = product.run()
    for _ in range(2 if INTERPRETED else 200):
        assert torch.equal(product.run(), first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_invariant_rows_do_not_depend_on_the_others(name: str, dtype: str) -> None:
    linear = invariant_of(MODELS[name], dtype)
    many = Product(linear, max(ROWS))
    check(many)
    whole = many.operands["out"].clone()
    for rows in (1, 2, max(ROWS) // 2):
        few = Product(linear, rows)
        for operand in ("a", "a_scale", "residual"):
            few.operands[operand] = many.operands[operand][:rows].contiguous()
        for operand in ("weight", "weight_scale", "bias"):
            few.operands[operand] = many.operands[operand]
        few.run()
        assert torch.equal(few.operands["out"][:rows], whole[:rows])
