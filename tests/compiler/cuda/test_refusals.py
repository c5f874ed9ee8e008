"""What no GPU kernel is made for is refused by name, with what to do."""

from __future__ import annotations

import pytest
from enginery.engines.errors import CompileError
from enginery.plugins.rms_norm import cuda as rms_norm


@pytest.mark.parametrize(("weight", "remedy"), [(True, "for a CPU"), (False, "--precision bf16, or for more GPUs")])
def test_rows_that_no_program_holds(weight: bool, remedy: str) -> None:
    """Of a norm, or of an activation that is quantized."""
    rows = rms_norm.RmsNorm(hidden=53248, eps=1e-5, out="fp8", weight=weight)
    with pytest.raises(CompileError, match=f"rows of 53248 elements, only to 32768. Build it .*{remedy}"):
        rms_norm.launches(rows, architecture=90)
