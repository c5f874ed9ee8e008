"""Measures on the NVIDIA GPU that is here; every part is a command, and leaves what it found when it is stopped.

    python -m benchmarks.gpu [--out DIR] [--shape SHAPE] PART ...

compile    compiles what tests and parts launch, for the GPU that is here, else for an H200: they find it in the cache
engines    makes random weights and builds engines of them (minutes of writing)
limits     what the GPU can do: memory, products; every other part measures that first
launches   what a launch costs inside a graph
gemm       products of the model's shapes beside torch's
attention  attention beside torch's
engine     decode and prefill of the engines, and what is lost between steps
serve      end to end over HTTP
tune       searches tiles for plugins/linear/tuning.json (--precision, --deadline seconds)
tune-attention  searches tiles and splits for plugins/attention/tuning.json, with a KV cache of the same type
table      prints what all parts have found

The exit code of a part is 1 where something must be faster, or has failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..checkpoints import SHAPES
from ..machine import ROOT
from .results import HEAD, Results
from .roofs import Shape

PARTS = (
    "compile",
    "engines",
    "limits",
    "launches",
    "gemm",
    "attention",
    "engine",
    "serve",
    "tune",
    "tune-attention",
    "table",
)


def main() -> None:
    """Runs the parts."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="where results are kept")
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--precision", default="fp8", choices=("bf16", "fp8", "int8"), help="of tune")
    parser.add_argument("--deadline", type=float, default=480, help="of tune, in seconds")
    arguments = parser.parse_args()
    results = Results(arguments.out)
    for part in dict.fromkeys(arguments.parts):
        print(f"== {part}\n{HEAD}", flush=True)
        with results.attempt(part, "not finished"):
            command(part, results, arguments)()
    if "table" in arguments.parts:
        print(results.table(), flush=True)
    (arguments.out / "table.txt").write_text(results.table())
    judged = {*arguments.parts, "limits", *(("gaps",) if "engine" in arguments.parts else ())}
    sys.exit(1 if "table" not in arguments.parts and results.failed(judged) else 0)


def command(part: str, results: Results, arguments: argparse.Namespace) -> Callable[[], None]:
    """What the part does. Imports are here: the table needs no torch."""
    if part == "table":
        return lambda: None
    from tests.gpu.launcher import target

    from . import attention, engine, engines, gemm, launches, limits, serve, tune, tune_attention

    shape, name = engines.shape_of(arguments.shape), target().name

    def after_limits(run: Callable[[], None]) -> Callable[[], None]:
        def both() -> None:
            limits.measure(results)
            run()

        return both

    commands: dict[str, Callable[[], None]] = {
        "compile": lambda: compile_all(shape),
        "engines": lambda: engines.run(results, engines.builds(arguments.shape, name)),
        "limits": lambda: after_limits(lambda: None)(),
        "launches": lambda: launches.run(results),
        "gemm": after_limits(lambda: gemm.run(results, shape)),
        "attention": after_limits(lambda: attention.run(results, shape)),
        "engine": after_limits(lambda: engine.run(results, engines.found(arguments.shape, name))),
        "serve": after_limits(lambda: serve.run(results, engines.builds(arguments.shape, name)[0])),
        "tune": lambda: tune.run(results, shape, arguments.precision, arguments.out, arguments.deadline),
        "tune-attention": lambda: tune_attention.run(
            results, shape, cache_type(arguments.precision), arguments.out, arguments.deadline
        ),
    }
    return commands[part]


def compile_all(shape: Shape) -> None:
    """Raises ValueError where a kernel cannot be compiled; the others are."""
    from itertools import chain

    from tests.gpu import test_kernels_attention, test_kernels_linear, test_kernels_rows, test_kernels_sample
    from tests.gpu.launcher import prepare, target

    from . import attention, gemm

    tests = (test_kernels_attention, test_kernels_linear, test_kernels_rows, test_kernels_sample)
    kernels = set(chain(gemm.kernels(shape), attention.kernels(shape), *(test.kernels() for test in tests)))
    print(f"{len(kernels)} kernels for {target().name}", flush=True)
    if refused := prepare(sorted(kernels, key=lambda kernel: kernel.name)):
        raise ValueError(f"not compiled: {', '.join(kernel.name for kernel in refused)}")


def cache_type(precision: str) -> str:
    """As the state's layout calls it."""
    return "i8" if precision == "int8" else precision


if __name__ == "__main__":
    main()
