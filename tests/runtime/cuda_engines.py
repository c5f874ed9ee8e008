"""Engines for GPUs whose kernels are empty shells, for devices that run nothing, and steps for them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enginery.compiler.build import BuildRequest, build, prepare
from enginery.compiler.cuda import choice
from enginery.compiler.cuda.kernels import CompiledKernel, file_name
from enginery.engines.plan import KernelImage
from enginery.engines.targets import Target
from enginery.plugins.launches import Kernel

from ..tiny import make_checkpoint

HIDDEN_POINTERS = 2
_EM_CUDA = 190


def shell(kernel: Kernel) -> bytes:
    """An ELF file without code. Behind its sections: the function's name, and the bytes of each parameter."""
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, _EM_CUDA, 1, 0, 0, 64, 0, 64, 56, 0, 64, 1, 0)
    sizes = [8 if kind.startswith("*") else 4 for _, kind in kernel.parameters] + [8] * HIDDEN_POINTERS
    return header + bytes(64) + f"{kernel.function} {' '.join(map(str, sizes))}\n".encode() + b"\0"


def compile_to_shells(
    kernels: Sequence[Kernel], target: Target, num_processes: int, progress: Callable[[int, int], None] = print
) -> dict[str, CompiledKernel]:
    """Stands for compile_kernels."""
    return {kernel.name: CompiledKernel(_image(kernel, target), shell(kernel)) for kernel in kernels}


def _image(kernel: Kernel, target: Target) -> KernelImage:
    return KernelImage(
        name=kernel.name,
        file=file_name(kernel, target),
        symbol=kernel.function,
        role=kernel.role,
        arch=target.arch,
        num_warps=kernel.num_warps,
        shared_bytes=64 << 10 if kernel.role == "gemm" else 0,
        registers=32,
        spill_bytes=0,
        instruction="",
        parameters=tuple("pointer" if kind.startswith("*") else kind for _, kind in kernel.parameters),
        hidden=HIDDEN_POINTERS,
        pdl=kernel.pdl,
    )


def build_shell(case: str, directory: Path, target: str = "h100", **options: Any) -> Path:
    """An engine of the tiny checkpoint `case` (tests/tiny.py), for a GPU."""
    make_checkpoint(case, directory / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "compile_kernels", compile_to_shells)
        request = BuildRequest(str(directory / "model"), directory / "engine", target=target, **options)
        with prepare(request) as prepared:
            return build(prepared)


def make_step(lengths: list[tuple[int, int]], rows: list[int], max_blocks: int = 4) -> dict[str, Any]:
    """A step of sequences with (known, new) tokens each; sequence i has the blocks 4 i …"""
    new = [tokens for _, tokens in lengths]
    positions = np.concatenate([np.arange(known, known + tokens) for known, tokens in lengths]).astype(np.int32)
    sequence = np.repeat(np.arange(len(lengths)), new).astype(np.int32)
    table = np.full((len(lengths), max_blocks), -1, np.int32)
    for index, (known, tokens) in enumerate(lengths):
        used = -(-(known + tokens) // 64)
        table[index, :used] = 4 * index + np.arange(used)
    slots = table[sequence, positions // 64].astype(np.int64) * 64 + positions % 64
    return {
        "num_tokens": len(positions),
        "num_rows": len(rows),
        "num_sequences": len(lengths),
        "token_ids": (positions * 7 + sequence) % 200 + 3,
        "positions": positions,
        "token_sequence": sequence,
        "prompt_lengths": np.full(len(positions), 99, np.int32),
        "query_start": np.concatenate([[0], np.cumsum(new)]).astype(np.int32),
        "rows": np.array(rows, np.int32),
        "groups": [{"block_table": table, "slots": slots}],
    }
