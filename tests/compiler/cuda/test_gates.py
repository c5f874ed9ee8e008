"""The machine code of GPU kernels: the tensor cores' instructions, no spills, shared memory that fits."""

from __future__ import annotations

import importlib.util
import json

import pytest

from .gates import TABLE, Build, builds, faults, images, row

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


@pytest.mark.parametrize("build", list(builds()), ids=lambda build: build.name)
def test_machine_code_is_as_it_must_be(build: Build) -> None:
    made = images(build)
    assert [fault for image in made for fault in faults(image, build)] == []
    table = json.loads(TABLE.read_text())[build.name]
    assert {image.name: row(image) for image in made} == table, "python -m tests.compiler.cuda.gates --update"
