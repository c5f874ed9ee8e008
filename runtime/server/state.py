"""What all requests share: the engine and whether it serves, its names, and what is counted of HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from ..engine import Engine
from .errors import ApiError

RECEIVE_GRACE_S = 0.5


@dataclass
class ServerState:
    """phase: "loading", "ready", "draining" or "failed", and why; in_flight: requests that are being answered.

    aliases: names that requests may use too, but that are not listed; renderer: where chat templates are waited for;
    receiving: of requests whose bodies are coming.
    """

    engine: Engine | None = None
    phase: str = "loading"
    reason: str = ""
    served_model_names: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    largest_body_bytes: int = 32 << 20
    created: int = field(default_factory=lambda: int(time.time()))
    started: float = field(default_factory=time.monotonic)
    in_flight: int = 0
    http_requests: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    fingerprint: str = "enginery"
    receiving: set[asyncio.Timeout] = field(default_factory=set)
    renderer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "enginery-template"))

    def serve(self, engine: Engine) -> None:
        """From now on `engine` answers."""
        self.engine = engine
        self.served_model_names = self.served_model_names or (engine.model.name,)
        self.fingerprint = _fingerprint(engine)
        self.phase = "ready"

    def drain(self) -> None:
        """From now on new requests are turned away; those whose bodies are still coming have a moment for the rest."""
        self.phase = "draining"
        for timeout in self.receiving:
            timeout.reschedule(asyncio.get_running_loop().time() + RECEIVE_GRACE_S)

    @asynccontextmanager
    async def receives_body(self) -> AsyncIterator[None]:
        """Around the reception of a body. Raises ApiError 503 where the server goes down meanwhile."""
        try:
            async with asyncio.timeout(None) as timeout:
                self.receiving.add(timeout)
                try:
                    yield
                finally:
                    self.receiving.discard(timeout)
        except TimeoutError:
            self.check()
            raise

    def fail(self, reason: str) -> None:
        """The engine cannot serve."""
        self.phase, self.reason = "failed", reason

    def check(self) -> None:
        """Raises ApiError 503 unless a request could be served now."""
        if self.phase == "ready" and self.engine is not None and (failure := self.engine.failure) is not None:
            self.fail(failure)
        match self.phase:
            case "ready":
                return
            case "loading":
                raise _unavailable("The engine is loading.", "loading", retry_s=1)
            case "draining":
                raise _unavailable(
                    "The server is going down and takes no new requests.", "draining", retry_s=5, last=True
                )
            case _:
                raise _unavailable("The engine failed. The server's log says why.", "failed", retry_s=None)

    def require_engine(self) -> Engine:
        """The engine. Raises ApiError 503 where it does not serve."""
        self.check()
        assert self.engine is not None
        return self.engine

    def require_model(self, name: object) -> str:
        """A served model's name; left out it is the first. Raises ApiError 404."""
        if name is None or name == "":
            return self.served_model_names[0]
        if not isinstance(name, str):
            raise ApiError(400, "model must be text.", param="model", code="invalid_value")
        if name not in (*self.served_model_names, *self.aliases):
            served = ", ".join(self.served_model_names)
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist; served here: {served}.",
                param="model",
                code="model_not_found",
            )
        return name

    def answering_name(self, requested: str) -> str:
        """The name that an answer bears: the one that was asked for."""
        return requested or self.served_model_names[0]

    def describe_model(self, name: str) -> dict[str, Any]:
        """An entry of /v1/models."""
        engine = self.require_engine()
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "enginery",
            "root": engine.model.name,
            "parent": None,
            "max_model_len": engine.model.max_model_len,
        }


def _unavailable(message: str, code: str, retry_s: int | None, last: bool = False) -> ApiError:
    headers = {} if retry_s is None else {"Retry-After": str(retry_s)}
    if last:
        headers["Connection"] = "close"
    return ApiError(503, message, code=code, headers=headers)


def _fingerprint(engine: Engine) -> str:
    """The same for one build of an engine, wherever it runs."""
    if engine.files is None:
        return "enginery"
    digest = hashlib.sha256()
    for name, entry in sorted(engine.files.manifest.files.items()):
        digest.update(f"{name}\0{entry.sha256}\0".encode())
    return f"enginery-{digest.hexdigest()[:12]}"
