"""run-engine: binds the port, loads the engine beside the server, serves until it is told to stop.

The port comes first, so that a taken one is known at once and health can be asked from the first moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from ..engines.errors import EngineryError
from ..engines.sizes import format_bytes
from .config import EngineConfig

if TYPE_CHECKING:
    from .engine import Engine
    from .server.state import ServerState

_FLAWED = 2
_POLL_S = 0.1
_CLOSE_S = 2.0


@dataclass(frozen=True)
class Address:
    """Where to serve. port 0: any free one."""

    host: str
    port: int


def serve(
    directory: Path,
    config: EngineConfig,
    address: Address,
    served_model_names: tuple[str, ...] = (),
    api_keys: tuple[str, ...] = (),
    shutdown_timeout: float = 30.0,
) -> int:
    """Serves until a signal or a failure; returns the exit code. Raises EngineryError for a port that cannot be had."""
    signals = _Signals()
    listener = bind(address)
    loading = _start_loading(directory, config)
    from .server.state import ServerState

    # Clients of vLLM call a model what the server was started with.
    aliases = () if served_model_names else (str(directory), directory.name)
    state = ServerState(served_model_names=served_model_names, aliases=aliases, api_keys=api_keys)
    with asyncio.Runner() as runner:
        status = runner.run(_Service(state, listener, loading, shutdown_timeout, signals).run())
    if not loading.done():
        # The loader cannot be interrupted, and nobody waits for what it loads.
        _exit_now(status)
    return status


def bind(address: Address) -> socket.socket:
    """A listening socket. Raises EngineryError."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise EngineryError(
            f"{address.host}:{address.port} cannot be served on: {reason}. Choose another with --host and --port."
        ) from None
    return listener


def _start_loading(directory: Path, config: EngineConfig) -> Future[Engine]:
    loading: Future[Engine] = Future()
    loading.set_running_or_notify_cancel()  # so that nobody can cancel it

    def load() -> None:
        from .engine import load_engine

        try:
            engine = load_engine(directory, config)
            engine.warm_up()
            loading.set_result(engine)
        except BaseException as error:
            loading.set_exception(error)

    threading.Thread(target=load, name="enginery-load", daemon=True).start()
    return loading


class _Signals:
    """Ctrl-C and SIGTERM: the first one ends a running service in order; before, after, and the second time all ends.

    They stay ours from before the event loop until the process has ended: the loop's own handlers would leave gaps.
    """

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stops = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    @contextlib.contextmanager
    def stop_service(self) -> Iterator[None]:
        """While this lasts, in an event loop, the first signal only sets `stopping`."""
        self._loop = asyncio.get_running_loop()
        try:
            yield
        finally:
            self._loop = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._loop is None or self._stops:
            _exit_now(128 + number)
        else:
            self._stops = True
            self._loop.call_soon_threadsafe(self.stopping.set)


class _Service:
    """The server and the engine while they live."""

    def __init__(
        self,
        state: ServerState,
        listener: socket.socket,
        loading: Future[Engine],
        shutdown_timeout: float,
        signals: _Signals,
    ) -> None:
        self._state, self._listener, self._loading, self._signals = state, listener, loading, signals
        self._shutdown_timeout = shutdown_timeout
        self._stopping = signals.stopping
        self._engine: Engine | None = None

    async def run(self) -> int:
        """Serves; returns the exit code."""
        with self._signals.stop_service():
            return await self._serve()

    async def _serve(self) -> int:
        from .server.app import create_app

        server = _make_server(create_app(self._state))
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        try:
            return await self._live()
        finally:
            if self._engine is not None and self._engine.model.chat_template is not None:
                self._engine.model.chat_template.close()
            server.should_exit = True
            await asyncio.wait([serving], timeout=_CLOSE_S)
            server.force_exit = True
            await serving
            if self._engine is not None:
                await asyncio.to_thread(self._engine.close)

    async def _live(self) -> int:
        stopping = asyncio.create_task(self._stopping.wait())
        loading = asyncio.wrap_future(self._loading)
        either: set[asyncio.Future[Any]] = {stopping, loading}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            loading.cancel()
            return 0
        try:
            self._engine = loading.result()
        except EngineryError as error:
            self._state.fail(str(error))
            _tell_error(error)
            stopping.cancel()
            return _FLAWED
        self._state.serve(self._engine)
        click.echo(self._ready_line(self._engine))
        return await self._watch(self._engine)

    async def _watch(self, engine: Engine) -> int:
        """Until a signal has come and running requests have ended, or the engine has failed."""
        told = False
        while not self._stopping.is_set():
            if (failure := engine.failure) is not None:
                self._state.fail(failure)
                click.echo(f"The engine stopped serving: {failure}", err=True)
                return _FLAWED
            if not told and (weights := engine.wait_until_settled(0)) is not None:
                told = True
                if weights:
                    click.echo(f"Weights: {weights}.")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _POLL_S)
        self._state.drain()
        deadline = asyncio.get_running_loop().time() + self._shutdown_timeout
        while self._state.in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        # Requests that are left end with an error.
        await asyncio.to_thread(engine.close)
        return 0

    def _ready_line(self, engine: Engine) -> str:
        host, port = self._listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        memory = engine.stats()["memory"]
        sizes = ", ".join(f"{purpose} {format_bytes(count)}" for purpose, count in sorted(memory.items()))
        target = engine.files.manifest.target if engine.files is not None else "cpu"
        names = ", ".join(self._state.served_model_names)
        sums_by = engine.stats()["sums_by"]
        sums = f"; large messages between GPUs summed by {sums_by}" if sums_by else ""
        return f"Serving {names} at {url} ({target}, up to {engine.model.max_model_len} tokens; {sizes}{sums})"


def _make_server(app: Any) -> Any:
    import uvicorn

    from .server.connection import Connection

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Signals are the service's."""
            yield

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        http=Connection,
        timeout_graceful_shutdown=1,
        timeout_keep_alive=75,
        server_header=False,
    )
    return Server(config)


def _tell_error(error: EngineryError) -> None:
    click.echo(f"{type(error).__name__}: {error}", err=True)


def _exit_now(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
