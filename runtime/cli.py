"""The commands run-engine and enginery."""

from __future__ import annotations

import json
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

import click

from .. import __version__
from ..engines.command_line import Command, Count, Group, Seconds
from ..engines.defaults import (
    CUDA_MAX_NUM_BATCHED_TOKENS,
    CUDA_MAX_NUM_SEQS,
    GPU_MEMORY_UTILIZATION,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    MIXED_PROMPT_TOKENS,
)
from ..engines.errors import EngineryError
from ..engines.sizes import parse_bytes
from .config import POLICIES, WEIGHT_PAGES, EngineConfig

_HELP = {"help_option_names": ["-h", "--help"]}
_DIRECTORY = click.Path(path_type=Path)
_FLAWED = 2
_POSITIVE = Count(1, (1 << 31) - 1)
# The group of entry points in pyproject.toml.
_BROUGHT = "enginery.commands"
_BUILT = "It is chosen when the engine is built: build-engine"
_CARRIED = "The engine carries its own: change the checkpoint's and build it again with build-engine."
_LATER = "It is not implemented yet."

# Options of vllm serve and its like that do not exist here.
_ELSEWHERE = {
    "--model": "The engine's directory is an argument: run-engine DIRECTORY.",
    "--num-gpu-blocks-override": "The memory for the state of sequences is --kv-cache-memory-bytes.",
    "--swap-space": "The memory for the state of sequences is --kv-cache-memory-bytes.",
    "--max-seq-len": "Did you mean --max-model-len?",
    "--ctx-size": "Did you mean --max-model-len?",
    "--max-batch-size": "Did you mean --max-num-seqs?",
    "--max-concurrent-requests": "Did you mean --max-num-seqs?",
    "-t": "Tensor parallelism is chosen when the engine is built: build-engine --tensor-parallel-size.",
    "--tp": "Tensor parallelism is chosen when the engine is built: build-engine --tensor-parallel-size.",
    "--pipeline-parallel-size": _LATER,
    "--data-parallel-size": "Start several servers behind a load balancer.",
    "--dtype": f"{_BUILT} --precision.",
    "--quantization": f"{_BUILT} --precision.",
    "-q": f"{_BUILT} --precision.",
    "--device": f"{_BUILT} --target.",
    "--block-size": f"{_BUILT} --target.",
    "--tokenizer": _CARRIED,
    "--chat-template": _CARRIED,
    "--generation-config": _CARRIED,
    "--hf-overrides": _CARRIED,
    "--trust-remote-code": "Nothing is ever run that a checkpoint or an engine brings; leave it out.",
    "--enable-chunked-prefill": "Prompts are always computed in chunks, of --max-num-batched-tokens; leave it out.",
    "--disable-log-requests": "Requests are never logged; leave it out.",
    "--disable-log-stats": "There are no log lines of statistics, see /metrics; leave it out.",
    "--enforce-eager": "There is nothing to switch off on this target; leave it out.",
    "--seed": "Requests have a seed each.",
    "--scheduling-policy": "Did you mean --capacity-scheduler-policy?",
    "--max-logprobs": "Requests may ask for up to 20.",
    "--ssl-keyfile": "TLS is for a proxy before the server.",
    "--ssl-certfile": "TLS is for a proxy before the server.",
    "--root-path": "Paths are for a proxy before the server.",
    "--enable-lora": _LATER,
    "--enable-auto-tool-choice": _LATER,
    "--tool-call-parser": _LATER,
    "--reasoning-parser": _LATER,
    "--speculative-config": _LATER,
}


def _parse_size(context: click.Context, param: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_bytes(value)
    except EngineryError as error:
        raise click.BadParameter(str(error)) from None


def _parse_gpus(context: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not all(number.isdecimal() and len(number) < 5 for number in value.split(",")):
        raise click.BadParameter(f"wanted numbers of GPUs with commas between, such as 0,1, got {value!r}.")
    return tuple(map(int, value.split(",")))


def _require_text(context: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """An empty key, from a variable that is not set, would let everybody in."""
    for value in values:
        if not value:
            raise click.BadParameter("must not be empty.")
        if value != value.strip() or not value.isprintable():
            raise click.BadParameter(
                f"wanted text without spaces around it and without control characters, got {value!r}."
            )
    return values


def _require_host(context: click.Context, param: click.Parameter, value: str) -> str:
    if not value:
        raise click.BadParameter("must not be empty; every address of this machine is 0.0.0.0.")
    return value


@click.command(name="run-engine", cls=Command, elsewhere=_ELSEWHERE, context_settings=_HELP)
@click.version_option(__version__, prog_name="run-engine")
@click.argument("directory", type=_DIRECTORY)
@click.option("--host", default="127.0.0.1", show_default=True, callback=_require_host, help="Address to serve on.")
@click.option("--port", default=8000, show_default=True, type=Count(0, 65535), help="0: any free one.")
@click.option(
    "--served-model-name",
    "served_model_names",
    multiple=True,
    callback=_require_text,
    help="Name that requests use; may be given several times. [default: the directory's name]",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    callback=_require_text,
    help="Key that requests must bear; may be given several times.",
)
@click.option("--max-model-len", type=_POSITIVE, help="Tokens of prompt and answer. [default: the engine's]")
@click.option(
    "--max-num-seqs",
    type=_POSITIVE,
    help=f"Sequences that run at once. [default: {MAX_NUM_SEQS}, on a GPU {CUDA_MAX_NUM_SEQS}]",
)
@click.option(
    "--max-num-batched-tokens",
    type=_POSITIVE,
    help=f"Tokens of one step. [default: {MAX_NUM_BATCHED_TOKENS}, of prompts {MIXED_PROMPT_TOKENS} "
    f"beside sequences that decode; on a GPU {CUDA_MAX_NUM_BATCHED_TOKENS}]",
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
    help="Memory for the state of sequences, such as 4GiB. [default: what they may need, at most 30 % of what is free; "
    "on a GPU what --gpu-memory-utilization leaves]",
)
@click.option(
    "--gpu-memory-utilization",
    type=float,
    help=f"Share of the GPU's memory that the engine may take. [default: {GPU_MEMORY_UTILIZATION}]",
)
@click.option(
    "--capacity-scheduler-policy",
    type=click.Choice(POLICIES),
    default=EngineConfig.capacity_scheduler_policy,
    show_default=True,
    help="Admit what is expected to fit to its end (without max_tokens: as long as others became), or what fits now.",
)
@click.option(
    "--gpus",
    callback=_parse_gpus,
    help="GPU of each rank of a tensor parallel engine, such as 0,1; 0,0: they share one. [default: the first ones]",
)
@click.option("--num-threads", type=_POSITIVE, help="Threads that compute. [default: all cores]")
@click.option("--verify", is_flag=True, help="Hash the weights before serving, not while.")
@click.option(
    "--weight-pages",
    type=click.Choice(WEIGHT_PAGES),
    default=EngineConfig.weight_pages,
    show_default=True,
    help="On a CPU: serve weights from their file's pages, from a copy in huge pages, or as a timed sample says.",
)
@click.option("--tensor-parallel-size", type=_POSITIVE, help="Is baked into the engine; must equal it.")
@click.option("--kv-cache-dtype", help="Is baked into the engine; must equal it.")
@click.option(
    "--shutdown-timeout",
    type=Seconds(),
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


class _Commands(Group):
    """Also the commands that other rooms bring, where they are installed."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Names of all commands."""
        return sorted({*super().list_commands(context), *entry_points(group=_BROUGHT).names})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command called `name`, or None."""
        own = super().get_command(context, name)
        if own is not None:
            return own
        return next((entry.load() for entry in entry_points(group=_BROUGHT, name=name)), None)


@click.group(cls=_Commands, context_settings=_HELP)
@click.version_option(__version__, prog_name="enginery")
def enginery() -> None:
    """Look at engines, and prepare them."""


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
    from .verify import TEMPLATE, verify_engine

    failed = []
    words = {True: "ok", False: "FAILED", None: "-"}
    for result in verify_engine(directory):
        failed += [result.name] if result.passed is False else []
        click.echo(f"{words[result.passed]:<6}  {result.name:<9}  {result.detail}", err=result.passed is False)
    if failed:
        # What the checkpoint brought is not mended by another copy.
        remedy = "Mend the checkpoint" if failed == [TEMPLATE] else "Copy it again whole, or build it again"
        click.echo(f"{directory}: not sound. {remedy}.", err=True)
        sys.exit(_FLAWED)
    click.echo(f"{directory}: sound.")


def _fail(error: EngineryError) -> NoReturn:
    click.echo(f"{type(error).__name__}: {error}", err=True)
    sys.exit(_FLAWED)
