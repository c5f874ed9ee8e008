"""The command `enginery layer-errors`, which pyproject.toml makes known to `enginery`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import click

from ...engines.command_line import Command
from ...engines.errors import EngineryError
from ...engines.layouts import GROUPS
from ..command import Progress, end_by_interrupt, require_extra
from ..startup import import_onnx_ir


@click.command(name="layer-errors", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option(
    "--calibration", type=click.Path(path_type=Path), required=True, help="What enginery calibrate made of MODEL."
)
@click.option("--group-size", type=click.Choice([str(group) for group in GROUPS]), help="As of build-engine.")
@click.option("--zero-points", is_flag=True, help="As of build-engine.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), help="[default: all cores]")
def layer_errors(
    model: str, calibration: Path, group_size: str | None, zero_points: bool, as_json: bool, threads: int
) -> None:
    """Tell what int8 and int4 cost each product of MODEL, the worst first, and which should stay in int8.

    The error of a product's outputs in percent of them, on the text that the calibration has seen.
    """
    require_extra("enginery layer-errors")
    import_onnx_ir()
    from .layer_errors import count_products, that_stand_out
    from .layer_errors import layer_errors as measure

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, end_by_interrupt)
    try:
        with Progress(count_products(model), "Measuring", "layer-errors", "{:,} products".format) as progress:
            found = measure(model, calibration, int(group_size or 0), zero_points, threads, progress.advance)
    except EngineryError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    kept = [name for each in that_stand_out(found) for name in each.names]
    advice = [option for name in kept for option in ("--layer-precision", f"{name}=int8")]
    if as_json:
        document = {"products": [asdict(each) for each in found], "build_with": advice}
        click.echo(json.dumps(document, indent=1))
        return
    width = max(len(_name(each.names)) for each in found)
    click.echo(f"{'product':{width}}  {'parameters':>14}  {'int8':>8}  {'int4':>8}")
    for each in sorted(found, key=lambda each: -each.int4):
        click.echo(f"{_name(each.names):{width}}  {each.num_parameters:>14,}  {each.int8:>8.3%}  {each.int4:>8.3%}")
    if advice:
        click.echo(f"\nMore than twice the median in int4; to keep them in int8, build with\n  {shlex.join(advice)}")
    else:
        click.echo("\nNone costs more than twice the median in int4.")


def _name(names: tuple[str, ...]) -> str:
    """Modules that are one product, shortly: their common parent once."""
    first, *others = names
    return ", ".join([first, *(other.rpartition(".")[2] for other in others)])
