"""plugins/attention/tuning.json: which of its entries a kernel of attention is made with."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from enginery.engines.fields import LARGEST
from enginery.plugins.attention import cuda
from enginery.plugins.attention.cuda import TILE_TOKENS, Attention, Split, Tiles, attention_launches, tuning_keys
from enginery.plugins.kv_write.cuda import StateLayout

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
KV_DTYPES = ("bf16", "fp8", "i8")
WHATS = ("decode", "prefill", "attend_any", "splits")


def make(kv_dtype: str, heads: int, kv_heads: int, head_dim: int, rot_dim: int) -> Attention:
    layout = StateLayout(kv_heads, head_dim, kv_dtype, 1 << 20)
    return Attention(layout, heads, 0, 128, rot_dim, 0.0, 1.0, 0.0, 0, False)


# Head sizes, and how many heads share a KV head, of every class.
OPERATORS = [
    make(kv_dtype, 2 * group, 2, head_dim, rot_dim)
    for kv_dtype, group, (head_dim, rot_dim) in product(
        KV_DTYPES, (1, 32, 33, 64, 65), ((64, 64), (96, 96), (128, 64), (256, 256), (192, 192))
    )
]


def test_every_entry_is_that_of_some_kernel_and_every_kernel_has_one() -> None:
    """An entry under a key that is misspelt, or that a more special one hides everywhere, would say nothing."""
    table, found = cuda._table(), set()
    for what, operator, arch in product(WHATS, OPERATORS, ARCHITECTURES):
        keys = [key for key in tuning_keys(what, operator, arch) if key in table]
        assert keys, (what, operator, arch)
        found.add(keys[0])
    assert found == set(table)


def test_entries_are_as_kernels_want_them() -> None:
    for key, entries in cuda._table().items():
        if key.startswith("splits"):
            splits = [Split(**entry) for entry in entries]
            bounds = [LARGEST if split.pairs is None else split.pairs for split in splits]
            assert bounds == sorted(set(bounds)), key
            assert bounds[-1] == LARGEST, key
        else:
            (tiles,) = (Tiles(**entry) for entry in entries)
            assert TILE_TOKENS % tiles.rows == 0 if not key.startswith("decode") else tiles.rows == 0, key
            assert tiles.keys.bit_count() == 1, key


@pytest.mark.parametrize(
    ("what", "kv_dtype", "heads", "size", "arch", "wanted"),
    [
        ("decode", "bf16", (32, 8), (64, 64), 90, Tiles(0, 128, 4, 3)),
        ("decode", "fp8", (32, 8), (128, 128), 90, Tiles(0, 128, 4, 3)),
        ("decode", "bf16", (32, 8), (96, 96), 80, Tiles(0, 64, 4, 3)),
        ("decode", "bf16", (8, 4), (256, 256), 120, Tiles(0, 32, 4, 3)),
        ("decode", "bf16", (71, 1), (64, 64), 90, Tiles(0, 32, 8, 3)),
        ("decode", "i8", (48, 1), (128, 128), 90, Tiles(0, 64, 8, 3)),
        ("prefill", "bf16", (32, 8), (128, 128), 90, Tiles(128, 128, 8, 2)),
        ("prefill", "bf16", (32, 8), (128, 128), 86, Tiles(128, 64, 8, 2)),
        ("prefill", "i8", (32, 8), (128, 64), 86, Tiles(64, 64, 8, 2)),
        ("prefill", "fp8", (32, 8), (80, 80), 100, Tiles(128, 64, 8, 2)),
        ("prefill", "i8", (32, 8), (128, 64), 90, Tiles(64, 64, 8, 2)),
        ("prefill", "fp8", (8, 4), (256, 256), 90, Tiles(64, 64, 8, 2, in_shared=True)),
        ("prefill", "bf16", (8, 4), (256, 256), 90, Tiles(128, 64, 8, 2)),
        ("prefill", "bf16", (8, 4), (256, 64), 90, Tiles(64, 64, 8, 2)),
        ("attend_any", "bf16", (32, 8), (128, 128), 90, Tiles(64, 64, 8, 2)),
        ("attend_any", "fp8", (32, 8), (128, 128), 89, Tiles(32, 64, 4, 2)),
        ("attend_any", "bf16", (8, 4), (256, 64), 90, Tiles(64, 32, 8, 2, in_shared=True)),
        ("attend_any", "i8", (8, 4), (256, 256), 90, Tiles(64, 32, 8, 2, in_shared=True, slices=2)),
        ("attend_any", "i8", (8, 4), (256, 256), 100, Tiles(64, 32, 8, 2, slices=2)),
        ("attend_any", "i8", (8, 4), (256, 256), 120, Tiles(32, 32, 8, 2)),
    ],
)
def test_tiles(
    what: str, kv_dtype: str, heads: tuple[int, int], size: tuple[int, int], arch: int, wanted: Tiles
) -> None:
    assert cuda._tiles(what, make(kv_dtype, *heads, *size), arch) == wanted


def test_the_most_special_entry_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For its type, its architecture and its shape, and for no other."""
    operator, keys = make("fp8", 32, 8, 128, 128), tuning_keys("prefill", make("fp8", 32, 8, 128, 128), 90)
    assert keys == (
        "prefill/whole/fp8/sm90/32x8x128",
        "prefill/whole/fp8/sm90",
        "prefill/whole/fp8",
        "prefill/whole",
    )
    table: dict[str, list[dict[str, Any]]] = {
        key: [{"rows": 64, "keys": 32 << place, "num_warps": 4, "num_stages": 2}] for place, key in enumerate(keys)
    }
    monkeypatch.setattr(cuda, "_table", lambda: table)
    more_heads = replace(operator, num_heads=64)
    bf16 = replace(operator, layout=replace(operator.layout, kv_dtype="bf16"))
    cases = [(operator, 90), (more_heads, 90), (operator, 89), (bf16, 90)]
    assert [cuda._tiles("prefill", each, arch).keys for each, arch in cases] == [32, 64, 128, 256]


def test_splits_of_a_shape_are_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = make("bf16", 32, 8, 128, 128)
    usual, key = cuda._table(), tuning_keys("splits", operator, 90)[0]
    entries = [{"pairs": 80, "splits": 5, "least_keys": 256}, {"pairs": None, "splits": 1, "least_keys": 64}]
    monkeypatch.setattr(cuda, "_table", lambda: usual | {key: entries})
    found = [
        (each.guard[0].low, each.guard[0].high, each.grid[2], each.values["least_tiles"])
        for each in attention_launches(operator, 90, "rows", True)
    ]
    assert found == [(1, 10, 5, 4), (11, LARGEST, 1, 1)]
    assert len(attention_launches(operator, 100, "rows", True)) == len(usual["splits"])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("domain", ["tokens", "rows"])
def test_tiles_that_take_the_place_of_others(domain: str, arch: int) -> None:
    """Ever smaller ones for the same arguments, down to what has registers to spare; no kernel twice."""
    for operator in (replace(each, invariant=invariant) for each in OPERATORS for invariant in (False, True)):
        launches = attention_launches(operator, arch, domain, arch >= 90)
        for launch in launches:
            kernels = [launch.kernel, *(each.kernel for each in launch.others)]
            assert len(set(kernels)) == len(kernels) > 1
            assert all(each.parameters == launch.kernel.parameters for each in kernels)
            assert kernels[-1].registers == 255
            constants = [dict(each.constants) for each in kernels]
            assert all(each["TILE"] in (16, 32, 64, 128) for each in constants)
            rows = [int(str(each.get("ROWS", 0))) for each in constants]
            assert rows == sorted(rows, reverse=True)
            assert rows[-1] in (0, 16, 32)
            assert all(TILE_TOKENS % max(each, 1) == 0 for each in rows)
        others = {each.kernel: [other.kernel for other in each.others] for each in launches}
        assert all([other.kernel for other in each.others] == others[each.kernel] for each in launches)
