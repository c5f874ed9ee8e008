"""The machine code of products that the table of gates has not: with biases, GELU, sizes that are no multiples."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import pytest
from enginery.compiler.cuda.choice import compile_chosen
from enginery.engines.targets import TARGETS, Target
from enginery.plugins.linear.cuda import Linear, linear_launches

from .gates import BUILDS, Build, faults

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
LINEARS = [
    Linear(n=1000, k=2000, dtype="", activation="gelu_tanh_gated", bias=True, prologue="norm", eps=1e-6),
    Linear(n=200, k=896, dtype="", activation="silu_gated", bias=True),
    Linear(n=40, k=100, dtype="", bias=True, residual=True, prologue="quantize"),
    Linear(n=32007, k=4160, dtype="", domain="rows", out_dtype="f32", softcap=30.0, bias=True, prologue="norm"),
    Linear(n=11008, k=8192, dtype="", activation="gelu_tanh_gated", bias=True),
    Linear(n=4096, k=11008, dtype="", bias=True, residual=True),
]
TYPES = [
    (target, dtype)
    for target in TARGETS.values()
    for dtype in dict.fromkeys(precision for precision, _ in BUILDS)
    if target.is_cuda and not (dtype == "fp8" and target.arch < 89) and not (dtype == "int8" and target.arch == 100)
]


@pytest.mark.parametrize(("target", "dtype"), TYPES, ids=lambda it: getattr(it, "name", it))
def test_no_register_spills_and_memory_fits(target: Target, dtype: str) -> None:
    wanted = [replace(each, dtype=dtype) for each in LINEARS]
    wanted += [replace(each, invariant=True, prologue=None) for each in wanted]
    launches = [launch for each in wanted for launch in linear_launches(each, target.arch, target.num_sms)]
    ways = dict.fromkeys((launch.kernel, *(each.kernel for each in launch.others)) for launch in launches)
    compiled = compile_chosen(list(ways), target, os.cpu_count() or 1)
    found = [fault for each in compiled.values() for fault in faults(each.image, Build(target, dtype, "bf16"))]
    assert found == []
