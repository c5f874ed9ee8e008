"""What needs a GPU is marked `gpu`; kernels' tests can be tried out without one, at small sizes:

TRITON_INTERPRET=1 pytest -m gpu tests/gpu/test_kernels_*.py
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from . import launcher

CONTEXT_LOST = 77
BEGUN = Path(os.environ.get("ENGINERY_GPU_BEGUN", ""))

if launcher.INTERPRETED:
    from ..interpreted.interpreter import repair

    repair()


@pytest.fixture(autouse=True)
def _a_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails where there is none, and gives back what a test has taken: engines take what torch leaves."""
    if request.node.get_closest_marker("gpu") is None or launcher.INTERPRETED:
        yield
        return
    if not torch.cuda.is_available():
        pytest.fail("there is no NVIDIA GPU that torch can use; kernels can be interpreted: TRITON_INTERPRET=1")
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"{request.node.nodeid} has left the GPU unusable for this process: {error}", CONTEXT_LOST)
    torch.cuda.empty_cache()


@pytest.fixture(scope="session", autouse=True)
def _compile_at_once(request: pytest.FixtureRequest) -> None:
    """All kernels that the collected tests will launch (each module's `kernels()`), on all cores."""
    if launcher.INTERPRETED or not torch.cuda.is_available():
        return
    names = {item.module.__name__ for item in request.session.items if hasattr(item, "module")}
    makers = [maker for name in sorted(names) if (maker := getattr(sys.modules[name], "kernels", None))]
    launcher.prepare(kernel for maker in makers for kernel in maker())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what an earlier process of the same run has begun, which a fault on the GPU has ended (ci/gpu.sh)."""
    if BEGUN.is_file():
        begun = set(BEGUN.read_text().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in begun])
        items[:] = [item for item in items if item.nodeid not in begun]


def pytest_configure(config: pytest.Config) -> None:
    """Failures are told at once: a run that is stopped at its limit ends without a summary."""
    if BEGUN.name:
        config.pluginmanager.register(_Teller(config), "tells failures at once")


class _Teller:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        with BEGUN.open("a") as file:
            file.write(f"{nodeid}\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.getplugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write_line(f"\n{report.nodeid} ({report.when}): {report.longreprtext[-3000:]}")
