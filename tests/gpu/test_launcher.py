"""Compiling for launches: what cannot be compiled keeps nothing else from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from enginery.engines.errors import CompileError
from enginery.engines.targets import TARGETS
from enginery.plugins.gather_rows.cuda import launches
from enginery.plugins.launches import Kernel

from . import launcher


@pytest.mark.parametrize("message", ["kernel {} could not be compiled", "kernel {} was terminated abruptly"])
def test_compiles_all_but_what_is_refused(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    kernels = [launches(columns=128 * (1 + index), architecture=90)[0].kernel for index in range(6)]
    bad = kernels[4]

    def compile_kernels(wanted: Sequence[Kernel], *_: Any) -> dict[str, Any]:
        if bad in wanted:
            # A worker that dies takes those with it that were being compiled: any of them may be named.
            raise CompileError(message.format((bad if "could" in message else wanted[0]).name))
        return {kernel.name: SimpleNamespace() for kernel in wanted}

    monkeypatch.setattr(launcher, "compile_kernels", compile_kernels)
    monkeypatch.setattr(launcher, "target", lambda: TARGETS["cuda-sm90"])
    monkeypatch.setattr(launcher, "_compiled", {})
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    assert launcher.prepare(kernels) == [bad]
    assert set(launcher._compiled) == {kernel.name for kernel in kernels if kernel != bad}


def test_chooses_as_an_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What spills is not launched, but what comes behind it, with its own grid; asked once for each kernel."""
    first, second, third = (launches(columns=128 * (1 + index), architecture=90)[0] for index in range(3))
    asked = []

    def compile_kernels(wanted: Sequence[Kernel], *_: Any) -> dict[str, Any]:
        asked.extend(wanted)
        return {
            kernel.name: SimpleNamespace(
                image=SimpleNamespace(
                    name=kernel.name, role="gemm", spill_bytes=8 * (kernel == first.kernel), shared_bytes=0
                )
            )
            for kernel in wanted
        }

    monkeypatch.setattr("enginery.compiler.cuda.choice.compile_kernels", compile_kernels)
    monkeypatch.setattr(launcher, "target", lambda: TARGETS["cuda-sm90"])
    monkeypatch.setattr(launcher, "_compiled", {})
    monkeypatch.setattr(launcher, "_chosen", {})
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    for _ in range(2):
        assert launcher.chosen(replace(first, others=(second, third))) == second
    assert asked == [first.kernel, second.kernel]
    assert launcher.chosen(third) == third
