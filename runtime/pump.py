"""The thread that drains the core: one wake-up per step, and one for each event loop that has requests in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..engines.errors import EngineryError
from .histograms import Observations
from .sequence import Delta, Sequence

if TYPE_CHECKING:
    import asyncio

    from ._core import Core, Output

_WAIT_S = 5.0


class Sink(Protocol):
    """Where the deltas of a prompt's outputs go. loop: the event loop that `put` runs in; None: the pump's thread."""

    loop: asyncio.AbstractEventLoop | None

    def put(self, delta: Delta) -> None:
        """Takes a delta. Must not block."""


@dataclass(slots=True)
class _Ticket:
    sequence: Sequence
    sink: Sink
    last_token_time: float = 0.0


class Pump:
    """Submits requests to a core and hands what comes out to their sinks."""

    def __init__(self, core: Core, on_first_token: Callable[[], None]) -> None:
        self.observations = Observations()
        self._core = core
        self._on_first_token = on_first_token
        self._seen_token = False
        self._tickets: dict[int, _Ticket] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="enginery-pump", daemon=True)
        self._thread.start()

    def submit(self, request: dict[str, Any], sequence: Sequence, sink: Sink) -> int:
        """Queues a request (see Core.submit) and returns its id."""
        with self._lock:
            # The lock is held until the ticket is there: the first token may come before submit() is back.
            request_id = self._core.submit(request)
            self._tickets[request_id] = _Ticket(sequence, sink)
        return request_id

    def abort(self, request_ids: list[int]) -> None:
        """Ends requests that still run; their sinks hear nothing more."""
        with self._lock:
            running = [request_id for request_id in request_ids if self._tickets.pop(request_id, None)]
        for request_id in running:
            self._core.abort(request_id)
            self.observations.finished["abort"] += 1

    def close(self) -> None:
        """Ends every request with "abort", then the thread."""
        self._closing = True
        self._core.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            outputs = self._core.wait(_WAIT_S)
            if outputs:
                self._dispatch(outputs)
            elif self._closing:
                return

    def _dispatch(self, outputs: list[Output]) -> None:
        letters: dict[asyncio.AbstractEventLoop, list[tuple[Sink, Delta]]] = {}
        now = time.monotonic()
        with self._lock:
            # Behind submit(), which may have sent a request off and not yet put its ticket there.
            tickets = [self._tickets.get(output.request_id) for output in outputs]
        for output, ticket in zip(outputs, tickets, strict=True):
            if ticket is None:
                continue
            delta = self._advance(ticket, output, now)
            if delta.finish_reason is not None:
                with self._lock:
                    self._tickets.pop(output.request_id, None)
                if output.finish_reason is None:
                    self._core.abort(output.request_id)
            if ticket.sink.loop is None:
                ticket.sink.put(delta)
            else:
                letters.setdefault(ticket.sink.loop, []).append((ticket.sink, delta))
        for loop, batch in letters.items():
            try:
                loop.call_soon_threadsafe(_hand_out, batch)
            except RuntimeError:  # the loop was closed under its requests
                self._abandon(loop)
        if not self._seen_token:
            self._seen_token = True
            self._on_first_token()

    def _advance(self, ticket: _Ticket, output: Output, now: float) -> Delta:
        try:
            delta = ticket.sequence.advance(output)
        except Exception as error:
            # One request's text must not end everybody's.
            delta = Delta(
                ticket.sequence.index, "", [], finish_reason="error", error=f"{type(error).__name__}: {error}"
            )
        self._observe(ticket, output, delta, now)
        return delta

    def _observe(self, ticket: _Ticket, output: Output, delta: Delta, now: float) -> None:
        observed, count = self.observations, len(delta.token_ids)
        if count:
            if not ticket.last_token_time:
                observed.time_to_first_token.observe(output.first_token_time - output.arrival_time)
                ticket.last_token_time = output.first_token_time
                count -= 1
            if count:
                observed.inter_token_latency.observe((now - ticket.last_token_time) / count, count)
                ticket.last_token_time = now
        if delta.finish_reason is not None:
            observed.end_to_end_latency.observe(now - output.arrival_time)
            observed.finished[delta.finish_reason] += 1

    def _abandon(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            lost = [request_id for request_id, ticket in self._tickets.items() if ticket.sink.loop is loop]
        self.abort(lost)


def _hand_out(batch: list[tuple[Sink, Delta]]) -> None:
    for sink, delta in batch:
        sink.put(delta)


class Gathering:
    """A sink for a thread that waits until everything has ended."""

    loop: asyncio.AbstractEventLoop | None = None

    def __init__(self, num_outputs: int, take: Callable[[Delta], None]) -> None:
        self._remaining, self._take = num_outputs, take
        self.done = threading.Event()

    def put(self, delta: Delta) -> None:
        """Takes a delta; the last one wakes who waits."""
        self._take(delta)
        if delta.finish_reason is not None:
            self._remaining -= 1
            if self._remaining == 0:
                self.done.set()


class DeltaStream:
    """A sink for a coroutine: `get` gives what has come since it was last called."""

    def __init__(self, num_outputs: int) -> None:
        from asyncio import get_running_loop  # here: it takes a fifth of the time of all imports

        self.loop: asyncio.AbstractEventLoop | None = get_running_loop()
        self._remaining = num_outputs
        self._deltas: list[Delta] = []
        self._waiter: asyncio.Future[None] | None = None
        self._failure: str | None = None

    def put(self, delta: Delta) -> None:
        """Takes a delta; runs in the loop."""
        self._deltas.append(delta)
        self._wake()

    def fail(self, reason: str) -> None:
        """Makes `get` raise."""
        self._failure = reason
        self._wake()

    async def get(self) -> list[Delta]:
        """All new deltas, at least one; empty once every output has ended. Raises EngineryError after fail()."""
        while not self._deltas:
            if self._failure is not None:
                raise EngineryError(self._failure)
            if self._remaining == 0:
                return []
            assert self.loop is not None
            self._waiter = self.loop.create_future()
            await self._waiter
        deltas, self._deltas = self._deltas, []
        self._remaining -= sum(delta.finish_reason is not None for delta in deltas)
        return deltas

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
