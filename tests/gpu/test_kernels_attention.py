"""Attention over paged caches at the shapes of real models, against torch in float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from enginery.plugins.launches import Kernel

from .launcher import INTERPRETED, run_launches
from .paged import KV_DTYPES, Heads, Scene, make_launches, make_operator
from .shapes import MODELS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

# Of a row: in units of its largest value.
TOLERANCE = 0.02

if INTERPRETED:
    HEADS = {"whole": Heads(4, 2, 16, 16), "part": Heads(4, 2, 24, 12, window=40), "cap": Heads(2, 1, 32, softcap=20.0)}
    HEADS |= {"invariant": Heads(4, 2, 16, 16, invariant=True)}
    STEPS = {"prefill": [(150, 150)], "decode": [(200, 1), (70, 1)], "both": [(130, 60), (65, 1)]}
else:
    HEADS = {
        name: Heads(model.num_heads, model.num_kv_heads, model.head_dim, model.head_dim)
        for name, model in MODELS.items()
    } | {
        "head size 96": Heads(32, 32, 96, 96),
        "head size 80, partly rotated": Heads(32, 8, 80, 40),
        "head size 256, window": Heads(8, 4, 256, 256, q_norm=True, window=1024),
        "head size 128, window": Heads(32, 8, 128, 128, window=500),
        "soft cap": Heads(16, 8, 256, 256, softcap=50.0),
        "soft cap and window": Heads(16, 8, 128, 128, softcap=50.0, window=777),
        "one KV head": Heads(16, 1, 64, 64),
        "invariant": Heads(32, 8, 128, 128, invariant=True),
        "invariant, head size 256, window": Heads(8, 4, 256, 256, window=1024, invariant=True),
    }
    STEPS = {
        "prefill of 2k": [(2048, 2048)],
        "a chunk behind a prefix": [(5000, 700)],
        "many short prompts": [(37 * i + 1, 37 * i + 1) for i in range(1, 20)],
        "decode of one": [(8191, 1)],
        "decode of 64": [(1024 + 13 * i, 1) for i in range(64)],
        "decode of 200": [(64 * (i % 7) + i, 1) for i in range(1, 201)],
        "both": [(3000, 1), (900, 300), (65, 1), (64, 64), (129, 1)],
    }


def kernels() -> Iterator[Kernel]:
    for heads in HEADS.values():
        for kv_dtype in KV_DTYPES:
            yield from (launch.kernel for launch in make_launches(make_operator(heads, kv_dtype)))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_attention(kv_dtype: str, heads: str, step: str) -> None:
    scene = Scene(kv_dtype, HEADS[heads], STEPS[step])
    found, wanted = scene.run(), scene.wanted()
    assert torch.isfinite(found).all()
    assert ((found - wanted).abs() <= TOLERANCE * wanted.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_invariant_results_do_not_depend_on_the_step(kv_dtype: str) -> None:
    """A sequence alone, and among so many that its keys are no longer split."""
    heads = HEADS["invariant"]
    lengths = [(150, 1), (70, 1)] if INTERPRETED else [(1500, 1), *((60 + i, 1) for i in range(200))]
    scene = Scene(kv_dtype, heads, lengths)
    together = scene.run()[0]
    # The first sequence alone: the same blocks of the same cache.
    scene.contexts, scene.table = lengths[:1], scene.table[:1].contiguous()
    scene.out.fill_(float("nan"))
    sizes, inputs = scene.step()
    run_launches(scene.launches(), sizes, inputs)
    assert torch.equal(scene.out[0, : len(together)].float(), together)
