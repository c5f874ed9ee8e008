"""Where build-engine begins: before anything else is imported, Ctrl-C is made to end it quietly."""

from __future__ import annotations

from ..engines.interrupts import exit_on_interrupt


def build_engine() -> None:
    """The command build-engine."""
    exit_on_interrupt()
    from .cli import build_engine as command

    command()
