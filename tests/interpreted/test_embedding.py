"""embedding for a GPU, interpreted, against its reference."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from enginery.plugins.embedding.cuda import launches
from enginery.plugins.embedding.reference import embedding
from hypothesis import given, settings
from hypothesis import strategies as st

from .interpreter import launch

TYPES: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "fp8": ml_dtypes.float8_e4m3fn, "i8": np.int8}
# What the step before has drawn; -1 where it could not.
DRAWN = np.array([7, -1, 0, 39, 60], np.int32)


@settings(max_examples=8, deadline=None, database=None)
@given(
    hidden=st.sampled_from([1, 100, 128, 1030]),
    vocab=st.integers(1, 40),
    vocab_start=st.sampled_from([0, 10]),
    scale=st.sampled_from([1.0, 11.5]),
    ids=st.lists(st.integers(-len(DRAWN), 60), min_size=1, max_size=5),
)
@pytest.mark.parametrize("kind", TYPES)
def test_matches_reference(kind: str, hidden: int, vocab: int, vocab_start: int, scale: float, ids: list[int]) -> None:
    random = np.random.default_rng(hidden + vocab)
    stride, padded = -(-hidden // 128) * 128, -(-vocab // 128) * 128
    table = np.zeros((padded, stride), TYPES[kind])
    table[vocab:] = 7  # nobody may look there
    table[:vocab, :hidden] = np.clip(random.normal(size=(vocab, hidden)) * 30, -127, 127).astype(TYPES[kind])
    table_scale = np.ones(padded, np.float32)
    table_scale[:vocab] = random.uniform(0.01, 0.1, vocab)
    token_ids = np.array(ids, np.int32)
    out = np.full((len(ids), stride), np.nan, ml_dtypes.bfloat16)
    arguments = {"token_ids": token_ids, "drawn": DRAWN, "table": table, "out": out}
    wide = table[:vocab].astype(np.float32)
    if kind != "bf16":
        arguments["table_scale"] = table_scale
        wide = wide * table_scale[:vocab, None]
    (plan,) = launches(hidden=hidden, vocab=vocab, vocab_start=vocab_start, scale=scale, table=kind, architecture=80)
    launch(plan.kernel, (len(ids), plan.grid[1], 1), arguments)  # type: ignore[arg-type]
    known = np.where(token_ids < 0, DRAWN[np.maximum(-1 - token_ids, 0)], token_ids)
    wanted = embedding(known, wide, scale=scale, vocab_start=vocab_start).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(out.view(np.uint16), wanted.view(np.uint16))
