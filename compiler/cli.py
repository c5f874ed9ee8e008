"""The command build-engine."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import __version__
from ..engines.command_line import Command
from ..engines.errors import EngineryError
from ..engines.layouts import GROUPS
from ..engines.precisions import KV_CACHE_DTYPES, PRECISIONS
from ..engines.sizes import format_bytes, parse_bytes
from ..engines.targets import target_names
from .calibration.defaults import DEFAULT_TOKENS
from .command import Progress, end_by_interrupt, require_extra
from .startup import import_onnx_ir

if TYPE_CHECKING:
    from .build import BuildRequest, Prepared


@click.command(name="build-engine", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="build-engine")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory of the engine. Must not exist.")
@click.option(
    "--target", default="cpu", show_default=True, help=f"{', '.join(target_names())}; cpu is this machine's best."
)
@click.option("--precision", default="int8", show_default=True, help=f"{', '.join(PRECISIONS)}.")
@click.option("--kv-cache-dtype", default="auto", show_default=True, help=f"auto, {', '.join(KV_CACHE_DTYPES)}.")
@click.option(
    "--group-size",
    type=click.Choice([str(group) for group in GROUPS]),
    help=f"Of int4: weights that share a scale. [default: {GROUPS[0]}]",
)
@click.option("--zero-points", is_flag=True, help="Of int4: each group has a zero point too; more exact, slower.")
@click.option(
    "--layer-precision",
    "layer_precisions",
    multiple=True,
    metavar="PATTERN=int8|int4",
    help="Of int8 and int4: what some products have instead, as lm_head=int4 or '*.down_proj=int8'. The last counts.",
)
@click.option("--max-model-len", type=click.IntRange(1), help="Default context length. [default: the model's own]")
@click.option(
    "--tensor-parallel-size", type=click.IntRange(1, 64), default=1, show_default=True, help="Ranks to shard for."
)
@click.option(
    "--batch-invariant",
    is_flag=True,
    help="Bit-identical results whatever else a step holds, at some speed. CPU engines always are.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="What a text makes of the activations, from enginery calibrate: int8 and int4 lose less.",
)
@click.option("--calibrate", type=click.Path(path_type=Path), help="A text to calibrate with, now; keeps no file.")
@click.option("--plan", "plan_only", is_flag=True, help="Print what the engine will need, and build nothing.")
@click.option("--memory", help="With --plan: the memory to plan for, such as 16GiB. [default: this machine's]")
@click.option(
    "--save-graph", type=click.Path(path_type=Path), help="Directory for the graph after every pass (ONNX and text)."
)
@click.option("--force", is_flag=True, help="Replace an engine that exists.")
@click.option(
    "--threads", type=click.IntRange(1), default=os.cpu_count(), help="Threads that pack weights. [default: all cores]"
)
def build_engine(
    model: str,
    output: Path | None,
    target: str,
    precision: str,
    kv_cache_dtype: str,
    group_size: str | None,
    zero_points: bool,
    layer_precisions: tuple[str, ...],
    max_model_len: int | None,
    tensor_parallel_size: int,
    batch_invariant: bool,
    calibration: Path | None,
    calibrate: Path | None,
    plan_only: bool,
    memory: str | None,
    save_graph: Path | None,
    force: bool,
    threads: int,
) -> None:
    """Compile MODEL, a Hugging Face checkpoint (a directory or a hub id), into an engine.

    The engine runs on the target's machines; it can be built on any machine.
    """
    require_extra("build-engine")
    if output is None and not plan_only:
        raise click.UsageError("Missing option '-o' / '--output': the directory of the engine.")
    if memory and not plan_only:
        raise click.UsageError("--memory belongs to --plan: it is the memory to plan for.")
    if calibrate and (calibration or plan_only):
        other = "--calibration: either brings what the other makes" if calibration else "--plan, which computes nothing"
        raise click.UsageError(f"--calibrate does not go with {other}. Leave one out.")
    # A build is short and leaves no cycles worth looking for: collecting would cost a fifth of a small one's time.
    gc.disable()
    import_onnx_ir()
    from .build import BuildRequest

    request = BuildRequest(
        model=model,
        output=output,
        target=target,
        precision=precision,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len or 0,
        tensor_parallel_size=tensor_parallel_size,
        save_graph=save_graph,
        force=force,
        num_threads=threads,
        batch_invariant=batch_invariant,
        group_size=int(group_size or 0),
        zero_points=zero_points,
        calibration=calibration,
        layer_precisions=layer_precisions,
    )
    # From here on there is something to put away.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, end_by_interrupt)
    try:
        with _calibrated(request, calibrate) as complete:
            _run(complete, plan_only, parse_bytes(memory) if memory else _machine_memory())
    except EngineryError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("Interrupted. Nothing was left behind.", err=True)
        sys.exit(130)


@contextmanager
def _calibrated(request: BuildRequest, text: Path | None) -> Iterator[BuildRequest]:
    """The request with a calibration from `text`, if there is one, in a file that is gone at the end."""
    if text is None:
        yield request
        return
    from .build import check_request
    from .calibration.calibrate import CalibrationRequest, calibrate

    check_request(request)  # now, as the text takes its time
    with tempfile.TemporaryDirectory(prefix="enginery-") as directory:
        file = Path(directory) / "calibration.safetensors"
        with Progress(DEFAULT_TOKENS, "Calibrating", "calibrate", "{:,} tokens".format) as progress:
            calibrate(CalibrationRequest(request.model, text, file), progress.advance)
        yield replace(request, calibration=file)


def _run(request: BuildRequest, plan_only: bool, memory_bytes: int) -> None:
    from .build import build, prepare

    started = time.monotonic()
    with prepare(request) as prepared:
        if plan_only:
            _print_plan(prepared, memory_bytes)
            return
        with Progress(prepared.tensor_bytes, "Writing weights", "weights", format_bytes) as progress:
            output = build(prepared, progress.advance, _tell_kernels)
    size = sum(path.stat().st_size for path in output.iterdir())
    seconds = time.monotonic() - started
    gc.freeze()
    what = f"{prepared.config.model_type} {request.precision} for {prepared.target.name}"
    click.echo(f"{output}: {what}, {format_bytes(size)}, {seconds:.1f} s")


def _tell_kernels(done: int, total: int) -> None:
    if done % 10 == 0 or done == total:
        click.echo(f"kernels: {done} of {total} compiled", err=True)


def _print_plan(prepared: Prepared, memory_bytes: int) -> None:
    threads = max(1, (os.cpu_count() or 1) // len(prepared.ranks))
    memory = prepared.memory(threads)
    request, config = prepared.request, prepared.config
    length = prepared.max_model_len
    rows = [
        ("model", f"{request.model} ({config.model_type}, {prepared.num_parameters / 1e6:,.1f} M parameters)"),
        (
            "engine",
            f"{prepared.target.name}, {request.precision}, KV cache {prepared.kv_cache_dtype}, TP {memory.world_size}",
        ),
        ("weights", f"{format_bytes(memory.weights)} ({memory.weights} bytes)"),
        ("activations", f"{format_bytes(memory.activations)} ({memory.activations} bytes, {threads} threads a rank)"),
        ("state per token", f"{memory.state_bytes_per_token} bytes"),
        ("state of one sequence", f"{format_bytes(memory.sequence_bytes(length))} at {length} tokens"),
    ]
    for name, text in rows:
        click.echo(f"{name:22} {text}")
    click.echo(f"\nIn {format_bytes(memory_bytes)} of memory:")
    if memory.largest_length(memory_bytes, 1, length) < 1:
        alone = format_bytes(memory.weights + memory.activations)
        click.echo(f"  nothing: weights and activations alone take {alone}", err=True)
        sys.exit(2)
    for batch in (1, 4, 16, 64):
        if longest := memory.largest_length(memory_bytes, batch, length):
            click.echo(f"  {batch:3} x {longest:,} tokens")
    click.echo(f"  {memory.largest_batch(memory_bytes, length):,} x {length:,} tokens, which is the longest context")


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
