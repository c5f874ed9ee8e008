"""How the commands read their arguments: each fault is one message with what was wanted, what was given, the remedy."""

from __future__ import annotations

import math
import sys
from typing import Any, NoReturn

import click

from .interrupts import exit_on_interrupt

_FLAWED = 2


class Command(click.Command):
    """A command that refuses in one message. elsewhere: options that users know from vLLM, and what stands for them."""

    def __init__(self, *args: Any, elsewhere: dict[str, str] | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._elsewhere = elsewhere or {}

    def __call__(self, *args: Any, **settings: Any) -> Any:
        exit_on_interrupt()
        return super().__call__(*args, **settings)

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Reads the arguments. Exits where they cannot be."""
        try:
            return super().parse_args(context, arguments)
        except click.UsageError as error:
            message = error.format_message()
            if isinstance(error, click.NoSuchOption) and error.option_name in self._elsewhere:
                message = f"{error.message} {self._elsewhere[error.option_name]}"
            _refuse(context, message)

    def invoke(self, context: click.Context) -> Any:
        """Runs the command. Exits where it finds its arguments at fault."""
        try:
            return super().invoke(context)
        except click.UsageError as error:
            _refuse(context, error.format_message())


class Group(click.Group):
    """A command of several."""

    command_class = Command

    def __call__(self, *args: Any, **settings: Any) -> Any:
        exit_on_interrupt()
        return super().__call__(*args, **settings)

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Reads what comes before the name of the command. Exits where that cannot be."""
        try:
            return super().parse_args(context, arguments)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            _refuse(context, error.format_message())

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is named. Exits where there is none."""
        try:
            return super().resolve_command(context, arguments)
        except click.UsageError as error:
            known = ", ".join(self.list_commands(context))
            _refuse(context, f"{error.format_message()} There are: {known}.")


class Count(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A whole number."""

    name = "integer"

    def __init__(self, low: int, high: int) -> None:
        self._low, self._high = low, high

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        """The number that `value` says."""
        try:
            count = int(value)
        except ValueError:
            count = None
        if count is None or not self._low <= count <= self._high:
            self.fail(f"wanted a whole number from {self._low} to {self._high}, got {str(value)[:80]!r}.")
        return count


class Seconds(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A time that passes."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        """The seconds that `value` says."""
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            self.fail(f"wanted a number of seconds, 0 or more, got {str(value)[:80]!r}.")
        return seconds


def _refuse(context: click.Context, message: str) -> NoReturn:
    names = []
    at: click.Context | None = context
    while at is not None:
        names.append(at.command.name or "")
        at = at.parent
    command = " ".join(reversed(names))
    end = "" if message.endswith((".", "?")) else "."
    click.echo(f"UsageError: {command}: {message}{end} See {command} --help.", err=True)
    sys.exit(_FLAWED)
