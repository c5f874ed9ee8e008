"""What Ctrl-C does to a command that has nothing to put away."""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT


def exit_on_interrupt() -> None:
    """Ctrl-C ends the process at once and quietly, with exit code 130, also while modules are being imported."""
    signal.signal(signal.SIGINT, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)
