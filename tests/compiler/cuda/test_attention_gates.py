"""The machine code of attention for heads that the table of gates has not: wide, partly rotated, padded."""

from __future__ import annotations

import importlib.util
import os

import pytest
from enginery.compiler.cuda.choice import compile_chosen
from enginery.engines.targets import TARGETS, Target
from enginery.plugins.attention.cuda import Attention, attention_launches
from enginery.plugins.kv_write.cuda import StateLayout

from .gates import instruction_of

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
# Head size, elements that are rotated, whether heads have a norm, soft-cap, window.
HEADS = [
    (256, 256, True, 50.0, 1024),
    (96, 96, False, 0.0, 0),
    (128, 64, False, 50.0, 777),
    (256, 64, False, 0.0, 0),
    (256, 256, False, 0.0, 0),
    (192, 192, False, 0.0, 0),
    (192, 64, True, 50.0, 777),
    (128, 128, True, 0.0, 777),
    # What takes the most registers.
    (256, 64, True, 50.0, 777),
    (256, 192, True, 50.0, 777),
    (248, 248, True, 50.0, 777),
    (136, 136, True, 50.0, 777),
    (80, 32, True, 50.0, 777),
]


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("target", [target for target in TARGETS.values() if target.is_cuda], ids=lambda it: it.name)
def test_no_register_spills_and_memory_fits(target: Target, invariant: bool) -> None:
    made = {}
    for kv_dtype in ("bf16", "fp8", "i8") if target.arch >= 89 else ("bf16", "i8"):
        for head_dim, rot_dim, norm, softcap, window in HEADS:
            layout = StateLayout(2, head_dim, kv_dtype, 1 << 20)
            operator = Attention(layout, 8, 0, 2048, rot_dim, 1e-6, 1.0, softcap, window, norm, invariant)
            for launch in attention_launches(operator, target.arch, "tokens", target.arch >= 90):
                way = (launch.kernel, *(each.kernel for each in launch.others))
                made[way] = (launch.kernel.function, kv_dtype, head_dim, rot_dim, softcap, window)
    compiled = compile_chosen(list(made), target, os.cpu_count() or 1)
    images = {what: compiled[way[0].name].image for way, what in made.items()}
    assert {what: image.spill_bytes for what, image in images.items() if image.spill_bytes} == {}
    assert max(image.shared_bytes for image in images.values()) <= target.shared_bytes
    assert all(image.instruction for image in images.values())
    products = {image.instruction for (function, *_), image in images.items() if function != "decode"}
    assert products == {instruction_of("bf16", target)}
