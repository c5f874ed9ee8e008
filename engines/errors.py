"""Errors a user can meet. Each message says what, where, wanted, got and the remedy; command lines print it alone."""

from __future__ import annotations


class EngineryError(Exception):
    """Base of every error that enginery raises on purpose."""


class CheckpointError(EngineryError):
    """A checkpoint that cannot be compiled as it is."""


class CompileError(EngineryError):
    """A build that cannot be done: a wrong option, a full disk, an output that exists."""


class EngineFormatError(EngineryError):
    """An engine whose bytes are not what FORMAT.md allows."""


class TargetError(EngineryError):
    """An engine, a target and a machine that do not fit together."""


class RequestError(EngineryError):
    """One request that asks for what cannot be done."""


class CapacityError(EngineryError):
    """Memory that does not suffice."""


def faults(kind: type[EngineryError], what: str, reasons: list[str]) -> EngineryError:
    """One error for everything that is wrong at once: a single reason on the line, several below it."""
    if len(reasons) == 1:
        return kind(f"{what}: {reasons[0]}")
    return kind(f"{what}:\n" + "\n".join(f"  - {reason}" for reason in reasons))
