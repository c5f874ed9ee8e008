"""A chat template at arm's length: rendered by a process of its own, which has so much CPU time and memory and no more.

A template comes with an engine, and an engine may come from anywhere. Jinja's sandbox keeps a template from the host,
not from looping for ever or multiplying texts, and what one call into C does, no check in Python interrupts. Besides,
a long rendering would hold the interpreter's lock, and with it everybody's stream.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines.errors import RequestError
from .template_worker import CPU_SECONDS, MEMORY_BYTES, OK, read_frame, write_frame

if TYPE_CHECKING:
    import subprocess

_WORKER = Path(__file__).with_name("template_worker.py")
# The worker ends itself by its CPU time; this is for a machine where it gets none.
_LONGEST_WAIT_S = 20.0


class TemplateProcess:
    """Renders one template, in a process that starts when first needed and anew after it died. For any thread.

    cpu_seconds: what compiling, and each rendering, may take
    """

    def __init__(self, source: str, cpu_seconds: float = CPU_SECONDS) -> None:
        self._source, self._cpu_seconds = source, cpu_seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._failure: str | None = None
        self._closed = False

    @property
    def compiled(self) -> bool:
        """Whether a process has the template ready."""
        return self._child is not None and self._failure is None

    def compile(self) -> None:
        """Has the template compiled, unless it is. Raises RequestError where it is no Jinja, or takes too much."""
        with self._lock:
            self._ready()

    def render(self, variables: dict[str, Any]) -> str:
        """The text that the template makes of `variables`. Raises RequestError with what the template says."""
        refused = "The chat template refuses these messages"
        try:
            data = json.dumps(variables, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RequestError(f"{refused}: they hold half a surrogate pair, which is no text.") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"{refused}: they are no JSON: {error}.") from None
        with self._lock:
            return self._ask(self._ready(), data, refused)

    def close(self) -> None:
        """Ends the process, in the middle of a rendering too."""
        self._closed = True
        if self._child is not None and self._owner == os.getpid():
            self._child.kill()

    def _ready(self) -> subprocess.Popen[bytes]:
        """The process with the template in it."""
        unusable = "The engine's chat template cannot be used"
        if self._closed or self._failure is not None:
            raise RequestError(self._failure or f"{unusable}: the engine is closed.")
        # A fork has its parent's pipes, which two must not use.
        if self._child is not None and self._owner == os.getpid() and self._child.poll() is None:
            return self._child
        import subprocess  # which a start without chats does not need

        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_WORKER), str(self._cpu_seconds), *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # What is preloaded (a sanitizer) may need more memory than the worker is allowed.
                env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
                start_new_session=True,
            )
        except (OSError, TypeError) as error:
            raise RequestError(f"{unusable}: no process to render it in can be started: {error}.") from None
        self._child, self._owner = child, os.getpid()
        weakref.finalize(self, _end, child, self._owner)
        try:
            self._ask(child, self._source.encode("utf-8", "surrogatepass"), unusable)
        except RequestError as error:
            # It would be the same another time.
            self._failure = str(error)
            _end(child, self._owner)
            raise
        return child

    def _ask(self, child: subprocess.Popen[bytes], data: bytes, complaint: str) -> str:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            write_frame(child.stdin, data)
            answer = read_frame(child.stdout) if _readable(child.stdout.fileno()) else None
        except OSError:
            answer = None
        if answer is None:
            _end(child, self._owner)
            raise RequestError(f"{complaint}: {self._cause(child.returncode)}.")
        text = answer[1:].decode()
        if answer[:1] != OK:
            raise RequestError(f"{complaint}: {text}.")
        return text

    def _cause(self, status: int) -> str:
        if status == -signal.SIGPROF:
            return f"it computes for more than {self._cpu_seconds:g} s"
        return f"it takes too long, or more than {MEMORY_BYTES >> 20} MiB of memory"


def _readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(_LONGEST_WAIT_S * 1000))


def _end(child: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:
        child.kill()
        with child:  # closes the pipes and waits
            pass
