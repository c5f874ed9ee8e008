"""What the engines load: random checkpoints, and each engine's own model made of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..checkpoints import SHAPES, make_checkpoint
from .engines import Engine
from .setup import WORK, WORKERS, Unavailable, environment, python, run, say, version
from .tokenizer import write_tokenizer

MODELS = ("qwen2.5-0.5b", "llama-3.2-1b", "qwen3-1.7b")


def checkpoint(shape: str) -> Path:
    """A random one with a tokenizer of full size, made unless it is there."""
    directory = WORK / "checkpoints" / shape
    if not (directory / "vocab.json").is_file():
        say(f"{shape}: writing a random checkpoint")
        make_checkpoint(shape, directory)
        write_tokenizer(directory, SHAPES[shape]["vocab_size"])
    return directory


def converted(engine: Engine, shape: str, precision: str) -> Path:
    """The engine's model, made unless it is there. Raises Unavailable."""
    directory = WORK / "models" / shape / f"{engine.folder}.{precision}"
    stamp = directory.with_name(directory.name + ".version")
    if stamp.is_file() and stamp.read_text() == version(engine):
        return directory
    say(f"{engine.name}: converting {shape} to {precision}")
    convert(engine, checkpoint(shape), directory, precision)
    stamp.write_text(version(engine))
    return directory


def convert(engine: Engine, source: Path, directory: Path, precision: str) -> Path:
    """Makes the engine's model of a checkpoint anew. Raises Unavailable."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    command = [python(engine), WORKERS / f"{engine.worker}.py", "convert", source, directory, precision]
    log = WORK / "logs" / f"convert.{engine.folder}.{directory.parent.name}.{precision}.log"
    try:
        run(command, log, env=environment(engine, os.cpu_count() or 1))
    except Unavailable:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return directory
