"""Clients of an OpenAI-compatible server on the loopback: each asks again as soon as it is answered."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .scenarios import REQUESTS_PER_CLIENT
from .setup import WORK


@dataclass
class Stream:
    """One answer: when it was asked for, and when each of its pieces came."""

    asked: float
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0


def measure_server(
    command: Callable[[int], list[str]],
    environment: dict[str, str],
    vocab_size: int,
    load: tuple[int, int, int],
    deadline: float,
) -> dict[str, float]:
    """Starts a server, asks it, stops it. load: clients, prompt tokens, output tokens. Raises OSError, TimeoutError."""
    port = _free_port()
    log = WORK / "logs" / f"server.{os.path.basename(command(port)[1])}.log"
    with open(log, "w") as file:
        # ik_llama.cpp's writes a log of its own to where it is started.
        process = subprocess.Popen(
            command(port), stdout=file, stderr=file, env=environment, cwd=log.parent, process_group=0
        )
    try:
        _wait_until_ready(process, port, deadline)
        clients, length, output = load
        # Once for the pools and caches of first requests.
        asyncio.run(asyncio.wait_for(ask_all(port, vocab_size, (2, length, 8), 1), deadline))
        streams = asyncio.run(asyncio.wait_for(ask_all(port, vocab_size, load, REQUESTS_PER_CLIENT), deadline))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return summary(streams, clients, output)


async def ask_all(port: int, vocab_size: int, load: tuple[int, int, int], times: int) -> list[Stream]:
    """`times` answers for each client, one after the other."""
    clients, length, output = load

    async def client() -> list[Stream]:
        streams = []
        for _ in range(times):
            prompt = [random.randrange(300, vocab_size - 300) for _ in range(length)]
            streams.append(await ask(port, prompt, output))
        return streams

    return [stream for streams in await asyncio.gather(*(client() for _ in range(clients))) for stream in streams]


async def ask(port: int, prompt: list[int], output: int) -> Stream:
    """One streamed completion of exactly `output` tokens."""
    body = {"model": "model", "prompt": prompt, "max_tokens": output, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    stream = Stream(time.perf_counter())
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    try:
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        await writer.drain()
        status = (await reader.readline()).decode(errors="replace")
        if " 200 " not in status:
            raise OSError(f"the server answered {status.strip()}: {(await reader.read())[-200:]!r}")
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                read_event(json.loads(line[6:]), stream)
    finally:
        writer.close()
    if stream.tokens != output:
        raise OSError(f"the server made {stream.tokens} tokens, not {output}")
    return stream


def read_event(event: dict[str, Any], stream: Stream) -> None:
    """A piece of text, or at last the usage."""
    if "error" in event:
        raise OSError(f"the server answered {event['error']}")
    if event.get("usage"):
        stream.tokens = event["usage"]["completion_tokens"]
    if any(choice.get("finish_reason") is None or choice.get("text") for choice in event.get("choices", [])):
        stream.pieces.append(time.perf_counter())


def summary(streams: Sequence[Stream], clients: int, output: int) -> dict[str, float]:
    """Values by cell. The rate is over all of the time: of the first question to the last piece."""
    begin, end = min(stream.asked for stream in streams), max(stream.pieces[-1] for stream in streams)
    first = [stream.pieces[0] - stream.asked for stream in streams]
    # A piece may hold several tokens: what came together has no time in between.
    gaps = [later - earlier for s in streams for earlier, later in zip(s.pieces, s.pieces[1:], strict=False)]
    return {
        f"{clients} clients, output": len(streams) * output / (end - begin),
        f"{clients} clients, TTFT p50": percentile(first, 50),
        f"{clients} clients, TTFT p99": percentile(first, 99),
        f"{clients} clients, ITL p50": 1e3 * percentile(gaps, 50),
        f"{clients} clients, ITL p99": 1e3 * percentile(gaps, 99),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all are no larger than (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(math.ceil(percent / 100 * len(ordered)), 1) - 1]


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, deadline: float) -> None:
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        if process.poll() is not None:
            raise OSError(f"the server ended with {process.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise TimeoutError("the server was not ready in time")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
