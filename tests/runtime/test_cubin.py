"""Machine code in another's place: for another architecture, or with other arguments than the plan gives."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from enginery.compiler.cuda.kernels import compile_kernels
from enginery.engines.errors import EngineFormatError
from enginery.engines.manifest import hash_file
from enginery.engines.plan import KernelImage
from enginery.engines.targets import TARGETS
from enginery.plugins.gather_rows import cuda as gather_rows
from enginery.runtime.config import EngineConfig
from enginery.runtime.cubin import architecture, argument_bytes, cubin_faults
from enginery.runtime.engine import load_engine
from enginery.runtime.gpus import null_gpus
from hypothesis import given
from hypothesis import strategies as st

from .cuda_engines import build_shell

IMAGE = KernelImage(
    name="embedding_1",
    file="embedding_1.cubin",
    symbol="embedding",
    role="embedding",
    arch=90,
    num_warps=4,
    shared_bytes=0,
    registers=32,
    spill_bytes=0,
    instruction="",
    parameters=("pointer", "i32"),
    hidden=2,
    pdl=False,
)
SIZES = [8, 4, 8, 8]


def make_cubin(arch: int = 90, symbol: str = "embedding", sizes: Sequence[int] = SIZES, abi: int = 7) -> bytes:
    """An ELF file without code, which tells what a compiled one does: its last parameter first."""
    info = struct.pack("<BBHI", 4, 0x37, 4, 129) + struct.pack("<BBH", 3, 0x1B, 255)
    for number, size in reversed(list(enumerate(sizes))):
        info += struct.pack("<BBHIHHI", 4, 0x17, 12, 0, number, 8 * number, size << 18 | 0x1F000)
    names = b"\0.shstrtab\0" + f".nv.info.{symbol}".encode() + b"\0"
    header = b"\x7fELF\x02\x01\x01\x33" + bytes([abi]) + bytes(7)
    flags = arch | 0x500500 if abi == 7 else arch << 8 | 0x6000002
    header += struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, 64, flags, 64, 56, 0, 64, 3, 1)
    first = 64 + 3 * 64
    sections = struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    sections += struct.pack("<IIQQQQIIQQ", 1, 3, 0, 0, first, len(names), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 11, 0x70000000, 0, 0, first + len(names), len(info), 0, 0, 4, 0)
    return header + sections + names + info


@pytest.mark.parametrize(("arch", "abi"), [(80, 7), (90, 7), (100, 8), (120, 8)])
def test_what_is_right_is_not_refused(arch: int, abi: int) -> None:
    cubin = make_cubin(arch, abi=abi)
    assert (architecture(cubin), argument_bytes(cubin, "embedding")) == (arch, SIZES)
    assert list(cubin_faults(cubin, replace(IMAGE, arch=arch))) == []


def test_everything_that_is_wrong_is_told_at_once() -> None:
    assert list(cubin_faults(make_cubin(80, sizes=[8, 8, 8]), IMAGE)) == [
        "is for compute capability 80, the plan says 90",
        "takes arguments of 8, 8, 8 bytes; the plan gives some of 8, 4, 8, 8",
    ]
    assert list(cubin_faults(make_cubin(sizes=[]), IMAGE)) == [
        "takes arguments of no bytes; the plan gives some of 8, 4, 8, 8"
    ]


def test_nothing_is_said_of_what_is_not_known() -> None:
    for cubin in (b"", b"\x7fELF", bytes(200), make_cubin(80, abi=9), make_cubin()[:63]):
        assert list(cubin_faults(cubin, IMAGE)) == []
    assert argument_bytes(make_cubin(), "embeddin") is None


@given(st.integers(0, len(make_cubin()) - 1), st.integers(0, 255), st.integers(0, len(make_cubin())))
def test_damage_is_no_crash(place: int, byte: int, length: int) -> None:
    cubin = bytearray(make_cubin())
    cubin[place] = byte
    list(cubin_faults(bytes(cubin[:length]), IMAGE))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", ["cuda-sm80", "cuda-sm90", "cuda-sm120"])
def test_compiled_kernels_are_as_they_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = TARGETS[name]
    copy = gather_rows.launches(columns=100, architecture=target.arch)[0].kernel
    compiled = compile_kernels([copy], target, 1)[copy.name]
    assert architecture(compiled.cubin) == target.arch
    assert argument_bytes(compiled.cubin, compiled.image.symbol) == [8] * 5
    assert list(cubin_faults(compiled.cubin, compiled.image)) == []


@pytest.mark.parametrize(
    ("cubin", "message"),
    [
        (make_cubin(80, sizes=[8] * 6), "is for compute capability 80, the plan says 90"),
        (make_cubin(90, sizes=[8] * 7), "takes arguments of 8, 8, 8, 8, 8, 8, 8 bytes; the plan gives some of"),
    ],
)
def test_an_engine_with_other_machine_code_is_refused(cubin: bytes, message: str, tmp_path: Path) -> None:
    engine = build_shell("llama", tmp_path)
    path = next(engine.glob("embedding_*.cubin"))
    path.write_bytes(cubin)
    manifest, entry = json.loads((engine / "manifest.json").read_text()), hash_file(path, "kernels", "cubin")
    manifest["files"][path.name] |= {"size": entry.size, "sha256": entry.sha256, "chunks": list(entry.chunks)}
    (engine / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EngineFormatError, match=rf"kernel embedding_\w+ in .*; build the engine again: {message}"):
        load_engine(engine, EngineConfig(kv_cache_memory_bytes=1 << 20), null_gpus(TARGETS["cuda-sm90"]))
