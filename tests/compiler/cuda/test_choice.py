"""Of several ways to do the same the first is taken whose machine code has no fault; where there is none, no engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from enginery.compiler.build import BuildRequest, build, prepare
from enginery.compiler.cuda import choice
from enginery.compiler.cuda.choice import compile_chosen
from enginery.compiler.cuda.kernels import CompiledKernel
from enginery.engines.errors import CompileError
from enginery.engines.plan import Launch, Plan
from enginery.engines.targets import TARGETS, Target
from enginery.plugins.gather_rows import cuda as gather_rows
from enginery.plugins.launches import Kernel
from enginery.plugins.linear import cuda as linear
from enginery.runtime.files import open_engine
from enginery.runtime.loader import read_ranks

from ...runtime.cuda_engines import compile_to_shells
from ...tiny import make_checkpoint

H100 = TARGETS["cuda-sm90"]
COPY = gather_rows.launches(columns=100, architecture=90)[0].kernel
PRODUCT = linear.linear_launches(linear.Linear(n=128, k=128, dtype="fp8"), 90, H100.num_sms)[-1].kernel
WAY = tuple(replace(PRODUCT, num_stages=stages) for stages in (4, 3, 2))


@pytest.fixture
def compile_as(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[Kernel]]]:
    """Kernels for which `wrong` says something have an image with these changes; a list of what was compiled."""

    def install(wrong: Callable[[Kernel], dict[str, Any]]) -> list[list[Kernel]]:
        turns = []

        def compile_kernels(
            kernels: Sequence[Kernel], target: Target, num_processes: int, progress: Any
        ) -> dict[str, CompiledKernel]:
            turns.append(list(kernels))
            shells = compile_to_shells(kernels, target, num_processes)
            return {
                each.name: replace(shells[each.name], image=replace(shells[each.name].image, **wrong(each)))
                for each in kernels
            }

        monkeypatch.setattr(choice, "compile_kernels", compile_kernels)
        return turns

    return install


def test_the_first_that_does_not_spill(compile_as: Callable[..., list[list[Kernel]]]) -> None:
    turns = compile_as(lambda kernel: {"spill_bytes": 8} if kernel in WAY[:2] else {})
    found = compile_chosen([WAY, (COPY,)], H100, 1)
    assert {name: each.image.name for name, each in found.items()} == {
        WAY[0].name: WAY[2].name,
        COPY.name: COPY.name,
    }
    assert turns == [[WAY[0], COPY], [WAY[1]], [WAY[2]]], "nothing is compiled that nobody needs"


def test_memory_must_be_there_too(compile_as: Callable[..., list[list[Kernel]]]) -> None:
    compile_as(lambda kernel: {"shared_bytes": H100.shared_bytes + (kernel == WAY[0])})
    assert compile_chosen([WAY], H100, 1)[WAY[0].name].image.name == WAY[1].name


def test_what_is_neither_product_nor_attention_may_spill(compile_as: Callable[..., list[list[Kernel]]]) -> None:
    compile_as(lambda kernel: {"spill_bytes": 8})
    assert compile_chosen([(COPY,)], H100, 1)[COPY.name].image.spill_bytes == 8


def test_without_any_the_build_is_refused(compile_as: Callable[..., list[list[Kernel]]]) -> None:
    """All that are wrong, and what with them."""
    other = replace(PRODUCT, num_warps=16)
    compile_as(lambda kernel: {"spill_bytes": 8 * kernel.num_stages})
    with pytest.raises(CompileError) as error:
        compile_chosen([WAY[2:], (other,), (COPY,)], H100, 1)
    text = str(error.value)
    assert text.startswith("cuda-sm90 has too few registers or too little shared memory for this model")
    assert f"kernel {WAY[2].name} spills 16 bytes\n" in text
    assert f"kernel {other.name} spills {8 * other.num_stages} bytes\n" in text
    assert COPY.name not in text
    assert "--kv-cache-dtype" in text


def launches_of(plan: Plan, kernel: str) -> list[Launch]:
    return [each for each in plan.forward if isinstance(each, Launch) and each.kernel.startswith(kernel)]


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_plans_launch_what_is_chosen(
    batch_invariant: bool, compile_as: Callable[..., list[list[Kernel]]], tmp_path: Path
) -> None:
    """Tiles of half the rows, twice as many of them; the memory is what was planned."""
    make_checkpoint("gemma3_text", tmp_path / "model")
    rows = 32 if batch_invariant else 64

    def spills(kernel: Kernel) -> bool:
        return kernel.role == "attention" and int(str(dict(kernel.constants).get("ROWS", 0))) > rows

    compile_as(lambda kernel: {"spill_bytes": 8 * spills(kernel)})
    request = BuildRequest(
        str(tmp_path / "model"), tmp_path / "engine", target="h100", precision="bf16", batch_invariant=batch_invariant
    )
    name = "attention_attend_any" if batch_invariant else "attention_prefill"
    with prepare(request) as prepared:
        planned = prepared.ranks[0].plan
        made = read_ranks(open_engine(build(prepared)))[0].plan
    kernels = {kernel.name for kernel in made.kernels}
    assert {each.kernel for each in made.forward if isinstance(each, Launch)} <= kernels
    assert made.buffers == planned.buffers
    before, after = launches_of(planned, name), launches_of(made, name)
    assert before
    for old, new in zip(before, after, strict=True):
        assert old.kernel != new.kernel
        assert old.kernel not in kernels
        assert list(old.arguments) == list(new.arguments)
        assert (old.guard, old.region) == (new.guard, new.region)
        if "tiles" in str(old.grid):
            axis = 0 if batch_invariant else 1
            parts, finer = (each.grid[axis] for each in (old, new))
            assert isinstance(parts, list | tuple)
            assert isinstance(finer, list | tuple)
            assert finer[2] == 2 * int(str(parts[2]))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_second_build_chooses_alike_and_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    a100, operator = TARGETS["cuda-sm80"], linear.Linear(n=128, k=128, dtype="bf16")
    product = linear.linear_launches(operator, a100.arch, a100.num_sms)[0].kernel
    way = (replace(product, registers=32), product)
    counts: list[int] = []
    first = compile_chosen([way], a100, 1, lambda done, total: counts.append(done))
    assert first[way[0].name].image.name == product.name
    assert counts == [1, 1]
    assert compile_chosen([way], a100, 1, lambda done, total: counts.append(done)) == first
    assert counts == [1, 1]
