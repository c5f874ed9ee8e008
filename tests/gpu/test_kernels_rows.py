"""The kernels around products and attention, at real sizes, against the plugins' NumPy references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from enginery.engines.expressions import evaluate
from enginery.plugins.embedding import cuda as embedding
from enginery.plugins.embedding.reference import embedding as wanted_embedding
from enginery.plugins.gather_rows import cuda as gather_rows
from enginery.plugins.kv_write.cuda import KvWrite, kv_write_launches
from enginery.plugins.kv_write.reference import kv_write
from enginery.plugins.launches import Kernel, Launch
from enginery.plugins.rms_norm import cuda as rms_norm
from enginery.plugins.rms_norm.reference import quantize_rows
from enginery.plugins.rms_norm.reference import rms_norm as wanted_norm
from enginery.plugins.rotary_table import cuda as rotary_table
from enginery.plugins.rotary_table.reference import rotary_table as wanted_rotary_table
from numpy.typing import NDArray

from .launcher import DEVICE, INTERPRETED, TYPES, run_launches, target
from .paged import KV_DTYPES, Cache, make_layout
from .products import pad, quantize
from .shapes import MODELS, Model, generator, normal, padded

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

TOKENS = 5 if INTERPRETED else 3000
FP32 = {"fp8": "*fp8e4nv", "i8": "*i8", "bf16": "*bf16"}
# rms_norm: delta, post_weight, weight, sum.
NORMS = [(False, False, True, False), (True, False, True, True), (True, True, True, True), (False, False, False, False)]
WIDE = {"small": 2880} if INTERPRETED else {"wide": 16384, "gemma": 2560, "odd": 1000}


def numpy(x: torch.Tensor) -> NDArray[Any]:
    """f32, or integers as they are."""
    array: NDArray[Any] = (x.float() if x.is_floating_point() else x).cpu().numpy()
    return array


def norm_of(hidden: int, out: str, form: tuple[bool, bool, bool, bool]) -> rms_norm.RmsNorm:
    return rms_norm.RmsNorm(hidden, 1e-5, out, *form)


def kv_of(model: Model, kv_dtype: str, norm: bool) -> KvWrite:
    layout = make_layout(model.num_kv_heads, model.head_dim, kv_dtype, layers=2)
    value_at = model.query + model.num_kv_heads * model.head_dim
    return KvWrite(layout, model.query, value_at, padded(model.qkv), model.head_dim, 1e-6, norm)


def kernels() -> Iterator[Kernel]:
    arch, found = target().arch, list[Launch]()
    for model in MODELS.values():
        for kv_dtype in KV_DTYPES:
            for norm in (False, True):
                found += kv_write_launches(kv_of(model, kv_dtype, norm), pdl=arch >= 90)
        for table in ("bf16", "fp8", "i8"):
            found += embedding_of(model, table)
        found += gather_rows.launches(columns=model.hidden, architecture=arch)
        found += rotary_table.launches(rotary_table.RotaryTable(model.head_dim), architecture=arch)
    for hidden in hidden_sizes():
        for out in ("bf16", "fp8", "i8"):
            for form in NORMS:
                found += rms_norm.launches(norm_of(hidden, out, form), architecture=arch)
    yield from (launch.kernel for launch in found)


def hidden_sizes() -> list[int]:
    return [*(model.hidden for model in MODELS.values()), *WIDE.values()]


def embedding_of(model: Model, table: str) -> tuple[Launch, ...]:
    shape = {"hidden": model.hidden, "vocab": model.vocab, "vocab_start": 0, "scale": 1.5}
    return embedding.launches(**shape, table=table, architecture=target().arch)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", NORMS, ids=str)
@pytest.mark.parametrize("out", ["bf16", "fp8", "i8"])
@pytest.mark.parametrize("hidden", hidden_sizes())
def test_rms_norm(hidden: int, out: str, form: tuple[bool, bool, bool, bool]) -> None:
    norm, random = norm_of(hidden, out, form), generator(hidden)
    rows = min(TOKENS, 700)
    arrays = {
        name: pad(normal(random, rows, hidden).to(torch.bfloat16), rows, padded(hidden)) for name in ("x", "delta")
    }
    arrays |= {name: normal(random, hidden) for name in ("post_weight", "weight")}
    arrays["sum"] = torch.full_like(arrays["x"], float("nan"))
    arrays["out"] = torch.full((rows, padded(hidden)), 77.0, device=DEVICE).to(TYPES[FP32[out]])
    arrays["out_scale"] = torch.full((rows,), float("nan"), device=DEVICE)
    run_launches(rms_norm.launches(norm, architecture=target().arch), {"tokens": rows}, arrays)
    x, delta = (numpy(arrays[name])[:, :hidden] for name in ("x", "delta"))
    delta_form, post, weighted, has_sum = form
    post_weight, weight = numpy(arrays["post_weight"]), numpy(arrays["weight"]) if weighted else None
    _, total = wanted_norm(x, delta if delta_form else None, post_weight if post else None, None, eps=norm.eps)
    if has_sum:
        found = numpy(arrays["sum"])
        assert not found[:, hidden:].any()
        np.testing.assert_allclose(found[:, :hidden], total, rtol=2**-7, atol=1e-6)
        total = found[:, :hidden]
    values, _ = wanted_norm(total, weight=weight, eps=norm.eps)
    found = numpy(arrays["out"])
    assert not found[:, hidden:].any()
    if out == "bf16":
        np.testing.assert_allclose(found[:, :hidden], values, rtol=2**-7, atol=1e-6)
        return
    quantized, scale = quantize_rows(values, out)
    np.testing.assert_allclose(numpy(arrays["out_scale"]), scale, rtol=1e-5)
    wide = quantized.astype(np.float32)
    step = 1.0 if out == "i8" else np.maximum(np.abs(wide) / 8, 2.0**-9)
    assert (np.abs(found[:, :hidden] - wide) <= step).all()
    assert (found[:, :hidden] == wide).mean() > 0.97


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_kv_write(name: str, kv_dtype: str, norm: bool) -> None:
    model, random = MODELS[name], generator(5)
    operator = kv_of(model, kv_dtype, norm)
    cache = Cache(model.num_kv_heads, model.head_dim, kv_dtype, TOKENS // 64 + 2, layers=2)
    cache.bytes.zero_()
    rows = (3 * normal(random, TOKENS, operator.stride)).to(torch.bfloat16)
    angles = normal(random, TOKENS, model.head_dim // 2)
    slots = torch.randperm(len(cache.bytes) * 64, generator=random, device=DEVICE)[:TOKENS]
    slots[::7] = -1
    weight = normal(random, model.head_dim)
    inputs = {"k": rows, "v": rows, "cos": angles.cos(), "sin": angles.sin(), "slots": slots, "k_norm": weight}
    sizes = {"tokens": TOKENS}
    run_launches(
        kv_write_launches(operator, pdl=target().arch >= 90), sizes, {**inputs, **cache.arguments(1), "count": TOKENS}
    )
    assert not cache.bytes[:, : cache.layout.layer_bytes].any(), "another layer is written"
    columns = model.num_kv_heads * model.head_dim
    k, v = (numpy(rows)[:, at : at + columns] for at in (operator.k_offset, operator.v_offset))
    empty = np.zeros((len(cache.bytes), 64, model.num_kv_heads, model.head_dim), np.float32)
    tables = numpy(inputs["cos"]), numpy(inputs["sin"]), numpy(weight) if norm else None
    wanted = kv_write(
        k, v, empty, empty, numpy(slots), *tables,
        head_dim=model.head_dim, rot_dim=model.head_dim, eps=operator.eps, kv_dtype=kv_dtype,
    )  # fmt: skip
    found = cache.unpacked(1, torch.arange(len(cache.bytes), device=DEVICE))
    # A scale may be rounded to its other neighbour, and then a value too.
    step = {"bf16": 2.0**-7, "fp8": 0.13, "i8": 1.1 / 127}[kv_dtype]
    for got, values in zip(found, wanted, strict=True):
        got, values = numpy(got).reshape(values.shape), np.asarray(values)
        reach = np.abs(values).max(-1, keepdims=True) if kv_dtype == "i8" else np.abs(values)
        least = np.abs(values).max(-1, keepdims=True) * 2.0**-16
        assert (np.abs(got - values) <= step * reach + least).all()
        assert (got != values).mean() <= 0.02


@pytest.mark.parametrize("kind", ["bf16", "fp8", "i8"])
@pytest.mark.parametrize("name", MODELS)
def test_embedding(name: str, kind: str) -> None:
    model, random = MODELS[name], generator(1)
    ids = torch.randint(-3, model.vocab + 2, (TOKENS,), generator=random, device=DEVICE, dtype=torch.int32)
    ids[:4] = torch.tensor([model.vocab - 1, model.vocab, -2, -3])
    drawn = torch.tensor([7, model.vocab - 1, -1], dtype=torch.int32, device=DEVICE)
    table, scale = quantize(normal(random, model.vocab, model.hidden), "int8" if kind == "i8" else kind)
    inputs = {"token_ids": ids, "drawn": drawn, "table": pad(table, padded(model.vocab), padded(model.hidden))}
    inputs["table_scale"] = pad(scale, padded(model.vocab))
    inputs["out"] = torch.full((TOKENS, padded(model.hidden)), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    run_launches(embedding_of(model, kind), {"tokens": TOKENS}, inputs)
    wide = numpy(table) * (1 if kind == "bf16" else numpy(scale)[:, None])
    known = torch.where(ids < 0, drawn[(-1 - ids).clamp(0, 2).long()], ids)
    wanted = torch.from_numpy(wanted_embedding(numpy(known), wide, scale=1.5)).to(torch.bfloat16)
    assert torch.equal(inputs["out"][:, : model.hidden].cpu(), wanted)
    assert not inputs["out"][:, model.hidden :].any()


@pytest.mark.parametrize("name", MODELS)
def test_gather_rows(name: str) -> None:
    hidden, random = MODELS[name].hidden, generator(2)
    x = normal(random, TOKENS, padded(hidden)).to(torch.bfloat16)
    rows = torch.randint(0, TOKENS, (TOKENS // 2,), generator=random, device=DEVICE, dtype=torch.int32)
    out = torch.full((len(rows), padded(hidden)), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    launches = gather_rows.launches(columns=hidden, architecture=target().arch)
    run_launches(launches, {"rows": len(rows)}, {"rows": rows, "x": x, "out": out})
    assert torch.equal(out, x[rows.long()])


@pytest.mark.parametrize("name", MODELS)
def test_rotary_table(name: str) -> None:
    """The device's cosine of angles up to a hundred thousand."""
    size, random = MODELS[name].head_dim, generator(3)
    positions = torch.randint(0, 131072, (TOKENS,), generator=random, device=DEVICE, dtype=torch.int32)
    frequencies = (500000.0 ** -(np.arange(0, size, 2) / size)).astype(np.float32)
    tables = {part: torch.full((TOKENS, size // 2), float("nan"), device=DEVICE) for part in ("cos", "sin")}
    inputs = {"positions": positions, "inv_freq": torch.from_numpy(frequencies).to(DEVICE), **tables}
    launches = rotary_table.launches(rotary_table.RotaryTable(size), architecture=target().arch)
    assert evaluate(launches[0].grid[0], {"tokens": TOKENS}) > 0
    run_launches(launches, {"tokens": TOKENS}, {**inputs, "count": TOKENS})
    at = numpy(positions)
    wanted = wanted_rotary_table(at, at, frequencies, rot_dim=size)
    for part, values in zip(("cos", "sin"), wanted, strict=True):
        np.testing.assert_allclose(numpy(tables[part]), values, rtol=0, atol=2e-6)
