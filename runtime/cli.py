"""The commands run-engine and enginery."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from ..engines.errors import EngineryError
from ..engines.sizes import parse_bytes
from .config import POLICIES, EngineConfig

_HELP = {"help_option_names": ["-h", "--help"]}
_DIRECTORY = click.Path(path_type=Path)
_FLAWED = 2


def _parse_size(context: click.Context, param: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_bytes(value)
    except EngineryError as error:
        raise click.BadParameter(str(error)) from None


def _require_text(context: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """An empty key, from a variable that is not set, would let everybody in."""
    if not all(values):
        raise click.BadParameter("must not be empty.")
    return values


@click.command(name="run-engine", context_settings=_HELP)
@click.argument("directory", type=_DIRECTORY)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option(
    "--served-model-name",
    "served_model_names",
    multiple=True,
    callback=_require_text,
    help="Name that requests use; may be given several times. [default: the model's own]",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    callback=_require_text,
    help="Key that requests must bear; may be given several times.",
)
@click.option("--max-model-len", type=click.IntRange(1), help="Tokens of prompt and answer. [default: the engine's]")
@click.option(
    "--max-num-seqs",
    type=click.IntRange(1),
    default=EngineConfig.max_num_seqs,
    show_default=True,
    help="Sequences that run at once.",
)
@click.option(
    "--max-num-batched-tokens",
    type=click.IntRange(1),
    default=EngineConfig.max_num_batched_tokens,
    show_default=True,
    help="Tokens of one step.",
)
@click.option(
    "--enable-prefix-caching/--no-enable-prefix-caching",
    default=True,
    show_default=True,
    help="Keep the state of prompts for others that begin alike.",
)
@click.option(
    "--kv-cache-memory-bytes",
    callback=_parse_size,
    help="Memory for the state of sequences, such as 4GiB. [default: what they may need, at most 30 % of what is free]",
)
@click.option(
    "--capacity-scheduler-policy",
    type=click.Choice(POLICIES),
    default=EngineConfig.capacity_scheduler_policy,
    show_default=True,
    help="Admit what is expected to fit to its end (without max_tokens: as long as others became), or what fits now.",
)
@click.option("--num-threads", type=click.IntRange(1), help="Threads that compute. [default: all cores]")
@click.option("--verify", is_flag=True, help="Hash the weights before serving, not while.")
@click.option("--tensor-parallel-size", type=click.IntRange(1), help="Is baked into the engine; must equal it.")
@click.option("--kv-cache-dtype", help="Is baked into the engine; must equal it.")
@click.option(
    "--shutdown-timeout",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds that running requests get to end when the server is stopped.",
)
def run_engine(
    directory: Path,
    host: str,
    port: int,
    served_model_names: tuple[str, ...],
    api_keys: tuple[str, ...],
    shutdown_timeout: float,
    **knobs: Any,
) -> None:
    """Serve the engine at DIRECTORY over HTTP, as OpenAI's API."""
    from .serve import Address, serve

    try:
        status = serve(
            directory, EngineConfig.of(knobs), Address(host, port), served_model_names, api_keys, shutdown_timeout
        )
    except EngineryError as error:
        _fail(error)
    sys.exit(status)


@click.group(context_settings=_HELP)
def enginery() -> None:
    """Look at engines."""


@enginery.command()
@click.argument("directory", type=_DIRECTORY)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(directory: Path, as_json: bool) -> None:
    """Show what the engine at DIRECTORY is."""
    from .inspect import describe_engine, inspect_engine

    try:
        facts = inspect_engine(directory)
    except EngineryError as error:
        _fail(error)
    click.echo(json.dumps(facts, indent=1) if as_json else describe_engine(facts))


@enginery.command()
@click.argument("directory", type=_DIRECTORY)
def verify(directory: Path) -> None:
    """Check the engine at DIRECTORY. Exit code 0: sound; 2: not."""
    from .verify import verify_engine

    sound = True
    words = {True: "ok", False: "FAILED", None: "-"}
    for result in verify_engine(directory):
        sound = sound and result.passed is not False
        click.echo(f"{words[result.passed]:<6}  {result.name:<9}  {result.detail}", err=result.passed is False)
    if not sound:
        click.echo(f"{directory}: not sound. Copy it again whole, or build it again.", err=True)
        sys.exit(_FLAWED)
    click.echo(f"{directory}: sound.")


def _fail(error: EngineryError) -> NoReturn:
    click.echo(f"{type(error).__name__}: {error}", err=True)
    sys.exit(_FLAWED)
