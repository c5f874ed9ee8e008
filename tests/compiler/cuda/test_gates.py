"""The machine code of GPU kernels: the tensor cores' instructions, no spills, shared memory that fits."""

from __future__ import annotations

import importlib.util
import json

import pytest
from enginery.engines.targets import Target

from .gates import TABLE, builds, faults, images, row

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


@pytest.mark.parametrize(
    ("target", "precision", "kv_cache_dtype"), list(builds()), ids=lambda item: str(getattr(item, "name", item))
)
def test_machine_code_is_as_it_must_be(target: Target, precision: str, kv_cache_dtype: str) -> None:
    made = images(target, precision, kv_cache_dtype)
    assert [fault for image in made for fault in faults(image, target, precision)] == []
    table = json.loads(TABLE.read_text())[f"{target.name} {precision} {kv_cache_dtype}"]
    assert {image.name: row(image) for image in made} == table, "python -m tests.compiler.cuda.gates --update"
