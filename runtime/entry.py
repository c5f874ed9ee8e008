"""Where the commands begin: before anything else is imported, Ctrl-C is made to end them quietly."""

from __future__ import annotations

from ..engines.interrupts import exit_on_interrupt


def run_engine() -> None:
    """The command run-engine."""
    exit_on_interrupt()
    from .cli import run_engine as command

    command()


def enginery() -> None:
    """The command enginery."""
    exit_on_interrupt()
    from .cli import enginery as command

    command()
