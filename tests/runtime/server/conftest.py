"""A real server on a port of its own, over an engine on the null executor."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from enginery.runtime.engine import Engine
from enginery.runtime.server.app import create_app
from enginery.runtime.server.connection import Connection
from enginery.runtime.server.state import ServerState
from enginery.runtime.tokenizer import Tokenizer

from ..conftest import null_engine


@dataclass
class Served:
    """A running server, and clients of it."""

    url: str
    engine: Engine
    state: ServerState
    http: httpx.Client
    openai: openai.OpenAI

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        headers = {"content-type": "application/json", **options.pop("headers", {})}
        return self.http.post(path, content=json.dumps(body), headers=headers, **options)

    def metric(self, name: str, **labels: str) -> float:
        from prometheus_client.parser import text_string_to_metric_families

        text = self.http.get("/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"enginery_{name}" and labels.items() <= sample.labels.items()
        )


@contextmanager
def serving(state: ServerState) -> Iterator[Served]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(state), log_level="critical", lifespan="off", http=Connection, timeout_graceful_shutdown=1
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with (
            httpx.Client(base_url=url, timeout=30) as http,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client,
        ):
            assert state.engine is not None or state.phase != "ready"
            yield Served(url, state.engine, state, http, client)  # type: ignore[arg-type]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextmanager
def serving_engine(engine: Engine, **settings: Any) -> Iterator[Served]:
    state = ServerState(**settings)
    state.serve(engine)
    with engine, serving(state) as served:
        yield served


Serve = Callable[..., Any]


@pytest.fixture(scope="session")
def served(byte_level: Tokenizer) -> Iterator[Served]:
    """One server for all tests that leave it as it is."""
    engine = null_engine(byte_level, max_model_len=512, spec={"num_blocks": [2048]})
    with serving_engine(engine, served_model_names=("tiny", "org/tiny")) as running:
        yield running
