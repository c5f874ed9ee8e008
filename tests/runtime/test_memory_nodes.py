"""Memory nodes: which of them CPUs belong to, and that a rank's memory asks for its own."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest
from enginery import Engine
from enginery.runtime import _core

SYS_MBIND, MPOL_PREFERRED = 237, 1  # on x86-64
NODES = {"online": "0,2-3\n", "node0/cpulist": "0-3,8\n", "node2/cpulist": "4-7,10-11\n", "node3/cpulist": "\n"}


@pytest.fixture
def machine(tmp_path: Path) -> str:
    """What a system of three nodes says, one of them without CPUs."""
    for name, text in NODES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("cpus", "nodes"),
    [([0], [0]), ([8], [0]), ([9], []), ([5, 11], [2]), ([3, 4], [0, 2]), ([12, 10, 1], [0, 2]), ([], [])],
)
def test_nodes_of_cpus(machine: str, cpus: list[int], nodes: list[int]) -> None:
    assert _core.nodes_of_cpus(cpus, machine) == nodes


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    assert _core.nodes_of_cpus([0, 1], str(tmp_path)) == []


def policies() -> list[str]:
    """Of this process's mappings, those that ask for nodes."""
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    return [policy for policy in (line.split()[1] for line in lines) if policy.startswith(("prefer", "interleave"))]


def may_choose() -> bool:
    """Whether the system lets this process say where memory lies; in many containers it does not."""
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    view = (ctypes.c_char * mmap.PAGESIZE).from_buffer(memory)
    mask = ctypes.c_ulong(1)
    return (
        ctypes.CDLL(None).syscall(
            SYS_MBIND, ctypes.c_void_p(ctypes.addressof(view)), mmap.PAGESIZE, MPOL_PREFERRED, ctypes.byref(mask), 64, 0
        )
        == 0
    )


def test_a_rank_s_memory_asks_for_its_nodes(built_engine: Path) -> None:
    nodes = _core.nodes_of_cpus(sorted(os.sched_getaffinity(0)))
    if len(nodes) != 1 or not may_choose() or not os.access("/proc/self/numa_maps", os.R_OK):
        pytest.skip(
            "this system has no memory nodes or several, lets nobody choose, or does not show where memory lies"
        )
    before = policies()
    with Engine.load(built_engine):
        found = policies()
    assert found.count(f"prefer:{nodes[0]}") > before.count(f"prefer:{nodes[0]}")
