"""Load over HTTP: `run-engine` in a process of its own, and a client that costs next to nothing for each token."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_RUN = "from enginery.runtime.entry import run_engine; run_engine()"


@dataclass(frozen=True)
class Server:
    """A running server. process: its id."""

    host: str
    port: int
    model: str
    process: int

    def metrics(self) -> dict[str, float]:
        """Of /metrics the sums by name, without `enginery_`."""
        url = f"http://{self.host}:{self.port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            text = answer.read().decode()
        found: dict[str, float] = {}
        for name, value in re.findall(r"^enginery_(\w+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
            found[name] = found.get(name, 0.0) + float(value)
        return found


@contextmanager
def serving(engine: Path, *options: str) -> Iterator[Server]:
    """Serves the engine on a free port of this machine. Raises RuntimeError with what it said, if it ends."""
    command = [sys.executable, "-c", _RUN, str(engine), "--host", "127.0.0.1", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if ready := re.match(r"Serving (\S+?)(?:,.*)? at http://([\d.]+):(\d+) ", line):
                yield Server(ready[2], int(ready[3]), ready[1], process.pid)
                break
        else:
            raise RuntimeError(f"run-engine ended: {''.join(said)}")
    finally:
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


@dataclass
class Answer:
    """One completion. began, events: when it was asked for and when tokens came, of time.perf_counter."""

    began: float
    events: list[float] = field(default_factory=list)
    status: int = 0
    num_tokens: int = 0
    error: str = ""


async def complete(server: Server, prompt: Sequence[int], hang_up_after: int | None = None, **body: Any) -> Answer:
    """Streams one completion. hang_up_after: so many events, then the connection is cut."""
    request = {"model": server.model, "prompt": list(prompt), "stream": True, "ignore_eos": True, "temperature": 0}
    request |= {"stream_options": {"include_usage": True}} | body
    data = json.dumps(request).encode()
    reader, writer = await asyncio.open_connection(server.host, server.port, limit=1 << 20)
    answer = Answer(time.perf_counter())
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {server.host}\r\ncontent-type: application/json\r\n"
        writer.write(head.encode() + f"content-length: {len(data)}\r\nconnection: close\r\n\r\n".encode() + data)
        answer.status = int((await reader.readline()).split()[1])
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if answer.status != 200 or line.startswith(b'data: {"error"'):
                answer.error = line.decode(errors="replace").strip()
            elif line.startswith(b"data: [DONE]"):
                break
            elif b'"usage":{' in line.replace(b" ", b""):
                answer.num_tokens = json.loads(line[6:])["usage"]["completion_tokens"]
            else:
                answer.events.append(time.perf_counter())
                if len(answer.events) == hang_up_after:
                    break
    finally:
        writer.close()
    return answer
