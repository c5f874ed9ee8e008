"""The command `enginery calibrate`, which pyproject.toml makes known to `enginery`."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import click

from ...engines.command_line import Command, Count
from ...engines.errors import EngineryError
from ...engines.sizes import format_bytes
from ..command import Progress, end_by_interrupt, require_extra
from ..startup import import_onnx_ir
from .defaults import DEFAULT_TOKENS, FEW_TOKENS


@click.command(name="calibrate", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--text", type=click.Path(path_type=Path), required=True, help="A text in UTF-8, such as is served.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The file. Must not exist.")
@click.option(
    "--tokens",
    type=Count(1, 1 << 30),
    default=DEFAULT_TOKENS,
    show_default=True,
    help="Tokens of the text to look at, from its start.",
)
@click.option("--force", is_flag=True, help="Replace a calibration file that exists.")
def calibrate(model: str, text: Path, output: Path, tokens: int, force: bool) -> None:
    """Look at what TEXT makes of MODEL's activations, for build-engine --calibration.

    The file serves every precision and target of this checkpoint.
    """
    require_extra("enginery calibrate")
    import_onnx_ir()
    from .calibrate import CalibrationRequest
    from .calibrate import calibrate as run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, end_by_interrupt)
    started = time.monotonic()
    try:
        with Progress(tokens, "Calibrating", "calibrate", "{:,} tokens".format) as progress:
            run(CalibrationRequest(model, text, output, tokens, force), progress.advance)
    except EngineryError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("Interrupted. Nothing was left behind.", err=True)
        sys.exit(130)
    size, seconds = format_bytes(output.stat().st_size), time.monotonic() - started
    click.echo(f"{output}: {progress.done} tokens, {size}, {seconds:.1f} s")
    if progress.done < FEW_TOKENS:
        click.echo(
            f"note: that is little text: int4 may lose more than without it, below {FEW_TOKENS} tokens", err=True
        )
