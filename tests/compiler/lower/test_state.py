"""State groups: layers that see alike, the bytes of their blocks, and what prefixes must have in common."""

from __future__ import annotations

from dataclasses import replace

import pytest
from enginery.compiler.lower.state import layer_in_group, prefix_key, state_groups
from enginery.compiler.models.config import Config
from enginery.compiler.models.rope import Rope
from enginery.compiler.passes.options import Options
from enginery.engines.plan import PrefixKey
from enginery.engines.precisions import PRECISIONS
from enginery.engines.targets import TARGETS

STATIC = Rope("static", 24, (1.0,) * 12)
LONG = replace(STATIC, kind="longrope", threshold=48)
DYNAMIC = replace(STATIC, kind="dynamic", threshold=64)
CONFIG = Config(
    model_type="gemma3_text",
    vocab_size=99,
    hidden_size=64,
    intermediate_size=96,
    num_layers=5,
    num_heads=8,
    num_kv_heads=4,
    head_dim=24,
    activation="silu",
    rms_norm_eps=1e-6,
    tied=True,
    max_model_len=128,
    windows=(16, 16, 0, 16, 0),
    ropes=(0,) * 5,
    rope_tables=(STATIC,),
    scale=1.0,
)


# plugins/README.md: 32 tokens of 24 elements, values padded to 16; int8 with two bytes for each scale.
HEAD_BYTES = {"f32": 32 * (24 + 32) * 4, "bf16": 32 * (24 + 32) * 2, "i8": 32 * (24 + 32) + 2 * 2 * 32}


@pytest.mark.parametrize("dtype", HEAD_BYTES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_layers_that_see_alike_are_one_group(ranks: int, dtype: str) -> None:
    options = Options(TARGETS["cpu-avx2"], PRECISIONS["fp32"], dtype, 0, ranks)
    full, window = state_groups(CONFIG, options)
    assert [(g.name, g.kind, g.window, g.layers) for g in (full, window)] == [
        ("full", "full", 0, 2),
        ("window16", "window", 16, 3),
    ]
    heads = 4 // ranks
    assert [g.num_kv_heads for g in (full, window)] == [heads, heads]
    assert [g.block_bytes for g in (full, window)] == [n * heads * HEAD_BYTES[dtype] for n in (2, 3)]
    assert [layer_in_group(CONFIG, layer) for layer in range(5)] == [0, 1, 0, 2, 1]


@pytest.mark.parametrize(
    ("tables", "key"),
    [
        ((STATIC,), PrefixKey()),
        ((STATIC, LONG), PrefixKey(48, False)),
        ((LONG, replace(LONG, rotary_dim=8)), PrefixKey(48, False)),
        ((DYNAMIC,), PrefixKey(64, True)),
        ((DYNAMIC, LONG), PrefixKey(48, True)),
        ((LONG, replace(LONG, threshold=32)), PrefixKey(32, True)),
    ],
)
def test_prefixes_are_shared_as_far_as_tables_allow(tables: tuple[Rope, ...], key: PrefixKey) -> None:
    assert prefix_key(replace(CONFIG, rope_tables=tables)) == key
