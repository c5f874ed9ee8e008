"""The engines that are measured: of random weights, made here, by the commands that users have."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints import SHAPES, make_checkpoint, tensor_shapes
from ..machine import ROOT
from .results import Cell, Results
from .roofs import Shape

PART = "engines"
WORK = ROOT / "build" / "benchmarks"
_BUILD = "from enginery.compiler.entry import build_engine; build_engine()"


@dataclass(frozen=True)
class Build:
    """One engine. name: of the shape."""

    name: str
    target: str
    precision: str
    kv_cache_dtype: str

    @property
    def directory(self) -> Path:
        """Where it lies."""
        return WORK / f"{self.name}.{self.target}.{self.precision}.{self.kv_cache_dtype}"

    @property
    def label(self) -> str:
        """In tables."""
        return f"{self.precision}, cache {self.kv_cache_dtype}"


def builds(name: str, target: str) -> tuple[Build, ...]:
    """What is judged first."""
    return Build(name, target, "fp8", "fp8"), Build(name, target, "bf16", "bf16")


def shape_of(name: str) -> Shape:
    """With its head size, which config.json may leave to be divided."""
    shape = SHAPES[name]
    return {"head_dim": shape["hidden_size"] // shape["num_attention_heads"]} | shape


def run(results: Results, wanted: tuple[Build, ...]) -> None:
    """Builds those that are not there; seconds of each."""
    results.begin(PART)
    for build in wanted:
        with results.attempt(PART, build.label):
            if (build.directory / "manifest.json").exists():
                print(f"{PART}: {build.directory} is there", flush=True)
                continue
            checkpoint = _checkpoint(build.name)
            _require_space(build)
            command = [sys.executable, "-c", _BUILD, str(checkpoint), "-o", str(build.directory), "--force"]
            command += ["--target", build.target, "--precision", build.precision]
            started = time.monotonic()
            subprocess.run([*command, "--kv-cache-dtype", build.kv_cache_dtype], check=True)
            results.add(Cell(PART, build.label, time.monotonic() - started, "s"))


def found(name: str, target: str) -> Iterator[Build]:
    """Those that are there."""
    for build in builds(name, target):
        if (build.directory / "manifest.json").exists():
            yield build


def _checkpoint(name: str) -> Path:
    """With a tokenizer of as many tokens as the model has, so that detokenizing costs what it costs."""
    directory = make_checkpoint(name, WORK / name)
    vocab = SHAPES[name]["vocab_size"]
    document = json.loads((directory / "tokenizer.json").read_text())
    if len(document["model"]["vocab"]) + len(document.get("added_tokens", [])) < vocab:
        known = {*document["model"]["vocab"].values(), *(token["id"] for token in document.get("added_tokens", []))}
        document["model"]["vocab"] |= {f"Ġword{token}": token for token in range(vocab) if token not in known}
        (directory / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False))
    return directory


def _require_space(build: Build) -> None:
    elements = sum(_product(size) for _, size in tensor_shapes(SHAPES[build.name]))
    needed, free = elements * (2 if build.precision == "bf16" else 1) * 1.1, shutil.disk_usage(WORK).free
    if free < needed:
        raise OSError(f"{WORK}: the engine needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")


def _product(size: tuple[int, ...]) -> int:
    count = 1
    for part in size:
        count *= part
    return count
