"""What the compiler's commands have in common."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import click

_REQUIRED = ("onnx", "onnx_ir", "ml_dtypes", "huggingface_hub")


class Progress:
    """A bar called `label` on a terminal, a line about `what` for every tenth elsewhere; `spell` says the total.

    done: how much `advance` was told of
    """

    def __init__(self, total: int, label: str, what: str, spell: Callable[[int], str]) -> None:
        self._what, self._spell = what, spell
        self._total, self.done, self._told = max(total, 1), 0, 0
        self._bar = click.progressbar(length=self._total, label=label) if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.file = sys.stderr
            self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.render_finish()

    def advance(self, count: int) -> None:
        """`count` more bytes are written."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif (tenth := min(self.done * 10 // self._total, 10)) > self._told:
            self._told = tenth
            click.echo(f"{self._what}: {tenth * 10} % of {self._spell(self._total)}", err=True)


def require_extra(command: str) -> None:
    """Exits unless what the compiler imports is installed."""
    missing = [name for name in _REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        click.echo(f'{command} needs {", ".join(missing)}: pip install "enginery[compiler]"', err=True)
        sys.exit(2)


def end_by_interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    """A signal's handler: as Ctrl-C, so that what is half done is put away."""
    raise KeyboardInterrupt
