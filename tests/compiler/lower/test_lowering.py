"""What no target has a kernel for is refused by its name."""

from __future__ import annotations

from typing import Any, cast

import pytest
from enginery.compiler.graph.builder import GraphBuilder
from enginery.compiler.lower.lowering import Lowering
from enginery.compiler.lower.tensors import CPU_LAYOUTS, TensorJobs
from enginery.compiler.passes.options import Options
from enginery.engines.errors import CompileError
from enginery.engines.precisions import find_precision
from enginery.engines.targets import TARGETS


@pytest.mark.parametrize("target", ["cpu-avx2", "cuda-sm90"])
def test_an_operator_without_a_kernel_is_refused(target: str) -> None:
    g = GraphBuilder("small")
    g.output(g.op("Swish", [g.input("x", ["tokens", 4])], ["tokens", 4], "silu"), "logits")
    options = Options(TARGETS[target], find_precision("bf16", TARGETS[target]), "bf16")
    with pytest.raises(CompileError, match=f"node 'silu': {target} has no kernel for Swish"):
        Lowering(g, cast(Any, None), options, TensorJobs(CPU_LAYOUTS)).walk()
