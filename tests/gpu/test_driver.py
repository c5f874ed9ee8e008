"""Launches from Python, on a driver without a GPU: the structures are NVIDIA's, and what is given arrives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ..runtime.test_cuda_driver import COMPILER, ROOT, compile_fake

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler {COMPILER}")

LAUNCH = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
from tests.gpu.driver import Function, count_parameters, make_current
from tests.runtime.cuda_engines import shell
from enginery.plugins.linear.cuda import Linear, linear_launches
launch = linear_launches(Linear(128, 256, "fp8"), 90, 132)[-1]
make_current()
function = Function(shell(launch.kernel), launch.kernel.function, 8, 200 << 10, pdl=sys.argv[2] == "pdl")
memory = (ctypes.c_char * 64)()
print(count_parameters(function))
arguments = [ctypes.c_uint64(0) if kind[0] == "*" else ctypes.c_int32(5) for _, kind in launch.kernel.parameters]
call = function.bind((3, 2, 1), [*arguments, ctypes.c_uint64(0), ctypes.c_uint64(0)])
call(0)
call(0)
"""
LAYOUT = """
#include <cstddef>
#include <cstdio>
#include <cuda.h>
#define AT(member) offsetof(CUlaunchConfig, member)
int main() {
    std::printf("[%zu,%zu,%zu,%zu,%zu,%zu,%zu,%zu,%d,%d]", sizeof(CUlaunchConfig), AT(gridDimX), AT(blockDimZ),
                AT(sharedMemBytes), AT(hStream), AT(attrs), AT(numAttrs), offsetof(CUlaunchAttribute, value),
                int(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION),
                int(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES));
}
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_fake(tmp_path_factory.mktemp("fake"))


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton, which has cuda.h, is not installed")
def test_structures_are_those_of_the_header(tmp_path: Path) -> None:
    import triton

    from . import driver

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    (tmp_path / "layout.cpp").write_text(LAYOUT)
    program = tmp_path / "layout"
    subprocess.run([COMPILER, f"-I{include}", str(tmp_path / "layout.cpp"), "-o", str(program)], check=True)
    config = driver.LaunchConfig
    names = ("grid_x", "block_z", "shared_bytes", "stream", "attributes", "num_attributes")
    ours = [driver.ctypes.sizeof(config), *(getattr(config, name).offset for name in names)]
    ours += [driver.LaunchAttribute.value.offset, driver._PDL, driver._SHARED_BYTES]
    assert json.loads(subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout) == ours


@pytest.mark.parametrize("pdl", [True, False])
def test_launches(fake: Path, tmp_path: Path, pdl: bool) -> None:
    log = tmp_path / "log"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake), "FAKE_CUDA_LOG": str(log)}
    command = [sys.executable, "-c", LAUNCH, str(ROOT), "pdl" if pdl else "plain"]
    told = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120)
    lines = [line for line in log.read_text().splitlines() if line.startswith("launch")]
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"launch gemm grid 3 2 1 block 256 shared {200 << 10}"), line
        assert ("attribute 6=1" in line) == pdl
        arguments = line.split(" arguments ")[1].split()
        assert len(arguments) == int(told.stdout)
        assert arguments[-3:] == ["5", "0", "0"]
