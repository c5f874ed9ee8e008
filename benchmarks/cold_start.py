"""Cold start: from process start to the first token, the engine in the page cache.

    python benchmarks/cold_start.py [SHAPE] [--precision int8] [--repeats 5] [--json FILE]

Each repeat is a fresh Python process that imports enginery, loads the engine, generates one token from a text prompt
and exits. Told apart: the first token (what a user waits for) and the whole process.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from checkpoints import SHAPES, make_checkpoint
from machine import ROOT, save

_PROGRAM = """
import sys, time
import enginery
with enginery.Engine.load(sys.argv[1]) as engine:
    engine.generate("Once upon a time", enginery.SamplingParams(max_tokens=1, temperature=0))
    print(time.time(), flush=True)
"""


def main() -> None:
    """Prints medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    engine = built_engine(arguments.shape, arguments.precision)
    first, whole = [], []
    for repeat in range(arguments.repeats + 1):
        started = time.time()
        answer = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(engine)], check=True, capture_output=True, text=True
        )
        if repeat:  # the first run brings the engine into the page cache
            first.append(float(answer.stdout) - started)
            whole.append(time.time() - started)
    result = {
        "shape": arguments.shape,
        "precision": arguments.precision,
        "first_token_s": statistics.median(first),
        "process_s": statistics.median(whole),
    }
    print(f"{'first token':16} {result['first_token_s']:.3f} s")
    print(f"{'whole process':16} {result['process_s']:.3f} s")
    save(arguments.json, result)


def built_engine(shape: str, precision: str, cache: str = "auto") -> Path:
    """An engine of a random checkpoint, built unless it is there already."""
    work = ROOT / "build" / "benchmarks"
    engine = work / f"{shape}.{precision}.{cache}"
    if not (engine / "manifest.json").exists():
        checkpoint = make_checkpoint(shape, work / shape)
        command = [str(Path(sys.executable).parent / "build-engine"), str(checkpoint), "-o", str(engine)]
        command += ["--precision", precision, "--kv-cache-dtype", cache]
        subprocess.run(command, check=True, capture_output=True)
    return engine


if __name__ == "__main__":
    main()
