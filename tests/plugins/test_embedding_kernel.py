"""embedding and gather_rows on the CPU: rows of every layout that holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from enginery.engines.errors import EngineFormatError
from enginery.plugins.embedding.reference import embedding
from enginery.plugins.gather_rows.reference import gather_rows
from enginery.plugins.linear import layouts
from hypothesis import given, settings
from hypothesis import strategies as st

LAYOUTS = ("rows_f32", "rows_bf16", "f32_k1n16", "bf16_k2n16", "int8_k4n16")


def build(kernels: Any, layout: str, tokens: int, vocab: int, hidden: int, seed: int) -> tuple[Any, Any]:
    """A call on ids around those of the table, and the table as the layout holds it."""
    random = np.random.default_rng(seed)
    table = random.normal(size=(vocab, hidden)).astype(np.float32)
    ids = random.integers(0, vocab + 20, tokens).astype(np.int32)
    attributes = {"hidden": hidden, "vocab": vocab, "scale": 1.5, "vocab_start": 10}
    call = kernels.Call("embedding", attributes, {"token_ids": ids})
    call.inputs("token_ids")
    if layout == "int8_k4n16":
        quantized, scale = layouts.quantize_int8(table)
        call.weight("table", layout, layouts.pack_int8_k4n16(quantized))
        call.weight("table_scale", "scale_f32", layouts.pad_vector(scale))
        table = quantized.astype(np.float32) * scale[:, None]
    elif "bf16" in layout:
        bits = kernels.to_bf16(table)
        call.weight("table", layout, bits if layout == "rows_bf16" else layouts.pack_bf16_k2n16(table))
        table = kernels.from_bf16(bits)
    else:
        call.weight("table", layout, table if layout == "rows_f32" else layouts.pack_f32_k1n16(table))
    call.buffer("out", np.full((tokens, -(-hidden // 64) * 64), np.nan, np.float32))
    return call, table


@settings(max_examples=10)
@given(
    tokens=st.integers(0, 9),
    vocab=st.integers(1, 60),
    hidden=st.integers(1, 150),
    seed=st.integers(0, 2**31),
    num_threads=st.integers(1, 3),
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_reference(isa: str, kernels: Any, layout: str, hidden: int, num_threads: int, **shape: Any) -> None:
    call, table = build(kernels, layout, hidden=hidden, **shape)
    call.run(isa, num_threads)
    wanted = embedding(call.step["token_ids"], table, scale=1.5, vocab_start=10)
    kernels.assert_close(call.arrays["out"][:, :hidden], wanted, "f32")
    assert not call.arrays["out"][:, hidden:].any()


@pytest.mark.parametrize("columns", [1, 64, 100])
def test_gathers_rows(isa: str, kernels: Any, columns: int) -> None:
    x = np.random.default_rng(0).normal(size=(9, columns)).astype(np.float32)
    rows = np.array([0, 3, 8], np.int32)
    call = kernels.Call("gather_rows", {"columns": columns}, {"num_tokens": 9, "rows": rows})
    call.inputs("rows")
    call.buffer("x", kernels.pad_rows(x))
    out = call.buffer("out", np.full((3, -(-columns // 64) * 64), np.nan, np.float32))
    call.run(isa, num_threads=2)
    np.testing.assert_array_equal(out, kernels.pad_rows(gather_rows(x, rows)))


HOSTILE = {
    "a small table": (lambda call: call.arrays.update(table=call.arrays["table"].ravel()[:-1].copy()), "table: wanted"),
    "more rows than there are": (lambda call: call.attributes.update(vocab=33), "table: wanted"),
    "a negative start": (lambda call: call.attributes.update(vocab_start=-1), "vocab_start"),
    "no scales": (lambda call: (call.operands.pop("table_scale"), call.arrays.pop("table_scale")), "table_scale is"),
    "another input": (lambda call: call.operands["token_ids"].update(name="positions"), "step input token_ids"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_refuses(isa: str, kernels: Any, fault: str) -> None:
    change, message = HOSTILE[fault]
    call, _ = build(kernels, "int8_k4n16", 4, 32, 64, 0)
    call.run(isa)
    change(call)
    with pytest.raises(EngineFormatError, match=message):
        call.run(isa)
