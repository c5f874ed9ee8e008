"""Compiling kernels: the same bytes every time, kept in the user's cache, found again only if nothing has changed."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from enginery.compiler.cuda import kernels
from enginery.compiler.cuda.kernels import cache_directory, cache_key, compile_kernels
from enginery.engines.errors import CompileError
from enginery.engines.targets import TARGETS
from enginery.plugins.gather_rows import cuda as gather_rows
from enginery.plugins.launches import Kernel
from enginery.plugins.linear import cuda as linear

H100 = TARGETS["cuda-sm90"]
COPY = gather_rows.launches(columns=100, architecture=90)[0].kernel
PRODUCT = linear.linear_launches(linear.Linear(n=128, k=128, dtype="fp8"), 90, H100.num_sms)[-1].kernel

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason='Triton is not installed: pip install "enginery[cuda]"'
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "enginery" / "kernels"


def count_compiled(wanted: list[Kernel]) -> int:
    counts = [0]
    compile_kernels(wanted, H100, 2, lambda done, total: counts.append(total))
    return counts[-1]


@needs_triton
def test_a_kernel_is_compiled_once_and_its_machine_code_is_told(cache: Path) -> None:
    assert cache_directory() == cache
    first = compile_kernels([PRODUCT, COPY, PRODUCT], H100, 2)
    assert sorted(first) == sorted([PRODUCT.name, COPY.name])
    product, copy = first[PRODUCT.name].image, first[COPY.name].image
    assert (product.role, product.instruction, product.spill_bytes) == ("gemm", "QGMMA", 0)
    assert product.name.startswith("linear_gemm_")
    assert 0 < product.shared_bytes <= H100.shared_bytes
    assert (copy.parameters, copy.hidden, copy.instruction) == (("pointer",) * 3, 2, "")
    assert first[COPY.name].cubin.startswith(b"\x7fELF")
    assert count_compiled([PRODUCT, COPY]) == 0
    assert compile_kernels([PRODUCT, COPY], H100, 2) == first

    entry = cache / cache_key(COPY, 90)
    damaged = bytearray(entry.read_bytes())
    damaged[-100] ^= 1
    entry.write_bytes(damaged)
    assert count_compiled([PRODUCT, COPY]) == 1, "a damaged entry is made again"
    assert compile_kernels([PRODUCT, COPY], H100, 2) == first, "and gives the same bytes"


def test_the_cache_knows_kernels_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {cache_key(COPY, 90), cache_key(COPY, 80), cache_key(replace(COPY, num_warps=8), 90), cache_key(PRODUCT, 90)}
    assert len(keys) == 4
    monkeypatch.setattr(kernels, "_sources", lambda: "other sources")
    keys.add(cache_key(COPY, 90))
    monkeypatch.setattr(kernels, "_triton_version", lambda: "99")
    keys.add(cache_key(COPY, 90))
    assert len(keys) == 6


@needs_triton
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compile_kernels([COPY], H100, 1)[COPY.name].image.role == "copy"


@needs_triton
def test_a_kernel_that_triton_refuses_is_one_error() -> None:
    with pytest.raises(CompileError, match=rf"{PRODUCT.name} could not be compiled for cuda-sm80"):
        compile_kernels([PRODUCT], TARGETS["cuda-sm80"], 1)  # which has no fp8


@needs_triton
def test_an_architecture_that_tritons_assembler_does_not_know(capfd: pytest.CaptureFixture[str]) -> None:
    """One error, and not a page of Triton's beside it."""
    unknown = replace(H100, name="cuda-sm130", arch=130)
    with pytest.raises(CompileError) as error:
        compile_kernels([COPY, PRODUCT], unknown, 1)
    assert str(error.value).startswith("cuda-sm130: the assembler of Triton ")
    assert str(error.value).endswith('pip install "enginery[cuda]"')
    assert capfd.readouterr() == ("", "")


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    with pytest.raises(CompileError, match=r'pip install "enginery\[cuda\]"'):
        compile_kernels([COPY], H100, 1)
