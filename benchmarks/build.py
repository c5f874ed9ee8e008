"""Building against copying: how long `build-engine` takes beside reading and writing as many bytes; peak memory.

    python benchmarks/build.py [SHAPE] [--precision int8] [--repeats 3] [--json FILE]

Pairs are run in turn; what is written is synced in both. The copy reads the checkpoint's bytes and writes the engine's.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from checkpoints import SHAPES, make_checkpoint
from machine import ROOT, save

_BLOCK = 8 << 20


def copy_seconds(checkpoint: Path, written: int, output: Path) -> float:
    """Seconds to read the checkpoint's weights and to write and sync `written` bytes."""
    started = time.perf_counter()
    remaining, block = written, b""
    with open(checkpoint / "model.safetensors", "rb", buffering=0) as source, open(output, "wb", buffering=0) as target:
        while data := source.read(_BLOCK):
            block = data
            remaining -= target.write(data[: max(min(len(data), remaining), 0)])
        while remaining > 0:
            remaining -= target.write(block[:remaining])
        os.fsync(target.fileno())
    return time.perf_counter() - started


def build_seconds(checkpoint: Path, output: Path, precision: str) -> float:
    """Seconds of the whole command, the engine synced at the end."""
    command = [
        str(Path(sys.executable).parent / "build-engine"),
        str(checkpoint),
        "-o",
        str(output),
        "--precision",
        precision,
    ]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    for path in output.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - started


def main() -> None:
    """Prints medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    work = ROOT / "build" / "benchmarks"
    checkpoint = make_checkpoint(arguments.shape, work / arguments.shape)
    engine = work / f"{arguments.shape}.{arguments.precision}"
    builds, copies, size = [], [], 0
    for _ in range(arguments.repeats):
        shutil.rmtree(engine, ignore_errors=True)
        builds.append(build_seconds(checkpoint, engine, arguments.precision))
        size = sum(path.stat().st_size for path in engine.iterdir())
        copies.append(copy_seconds(checkpoint, size, work / "copy"))
        (work / "copy").unlink()
    ratios = [build / copy for build, copy in zip(builds, copies, strict=True)]
    result = {
        "shape": arguments.shape,
        "precision": arguments.precision,
        "build_s": statistics.median(builds),
        "copy_s": statistics.median(copies),
        "ratio": statistics.median(ratios),
        "pairs_s": [[round(build, 3), round(copy, 3)] for build, copy in zip(builds, copies, strict=True)],
        "engine_bytes": size,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }
    for name in ("build_s", "copy_s", "ratio"):
        print(f"{name:16} {result[name]:.2f}")
    print(f"{'of single pairs':16} {min(ratios):.2f} to {max(ratios):.2f}: disks differ, and the copy is mostly theirs")
    print(f"{'engine':16} {size / 1e6:.0f} MB")
    print(f"{'peak RSS':16} {result['peak_rss_bytes'] / 1e6:.0f} MB")
    save(arguments.json, result)


if __name__ == "__main__":
    main()
