"""Drives the workers: one turn of one engine at one group of cells."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .engines import Engine
from .evict import evict
from .scenarios import CLIENT_INPUT, CLIENT_OUTPUT, CLIENTS, GROUPS, REQUESTS_PER_CLIENT, Cell
from .serving import Stream, measure_server, summary
from .setup import WORK, WORKERS, environment, python

_SLACK = 64
# Warm starts are repeated, unless one takes so long that it says enough.
_LOADS, _LOADS_SECONDS = 3, 30.0


@dataclass(frozen=True)
class Task:
    """What an engine is to measure with."""

    engine: Engine
    model: Path
    precision: str
    vocab_size: int
    threads: int
    deadline: float

    def options(self, cells: tuple[Cell, ...], port: int = 0) -> str:
        """Of the worker: room for the longest of these cells, and for as many sequences as one of them has."""
        return json.dumps(
            {
                "precision": self.precision,
                "vocab_size": self.vocab_size,
                "threads": self.threads,
                "context": max(cell.input + cell.output for cell in cells) + _SLACK,
                "sequences": max(cell.batch for cell in cells),
                "port": port,
            }
        )

    def command(self, name: str, options: str) -> list[str]:
        """Of a worker."""
        return [str(python(self.engine)), str(WORKERS / f"{self.engine.worker}.py"), name, str(self.model), options]


class Failed(Exception):
    """A worker gave no answer."""


def measure(task: Task, group: str) -> tuple[dict[str, float], dict[str, str]]:
    """Values by cell, and why others have none."""
    if group == "load":
        return _guarded(group, lambda: measure_load(task))
    if group == "server":
        return _guarded(group, lambda: _serve(task))
    return measure_cells(task, GROUPS[group])


def measure_cells(task: Task, cells: tuple[Cell, ...]) -> tuple[dict[str, float], dict[str, str]]:
    """All in one process, one after the other."""
    values: dict[str, float] = {}
    failures: dict[str, str] = {}
    with _worker(task, "measure", task.options(cells)) as worker:
        try:
            ready = worker.answer(task.deadline)
            if "error" in ready:
                raise Failed(ready["error"])
            for cell in cells:
                if cell.kind == "rss":
                    continue
                answer = worker.ask(_request(cell), task.deadline)
                if "error" in answer:
                    failures[cell.name] = answer["error"]
                else:
                    values[cell.name] = answer["value"]
            last = worker.finish(task.deadline)
            values |= {cell.name: last["peak_rss_bytes"] / 1e6 for cell in cells if cell.kind == "rss"}
        except Failed as error:
            failures |= {cell.name: str(error) for cell in cells if cell.name not in {*values, *failures}}
    return values, failures


def ask(task: Task, options: str, request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a worker of its own to one request. Raises Failed."""
    with _worker(task, "measure", options) as worker:
        ready = worker.answer(task.deadline)
        return ready if "error" in ready else worker.ask(request, task.deadline)


def measure_load(task: Task) -> dict[str, float]:
    """Process start to first token, and to the end of the process: the files out of the page cache, then in it."""
    evict([task.model, python(task.engine).parents[1] / "lib"])
    cold, _ = _first_token(task)
    warm = [_first_token(task)]
    while len(warm) < _LOADS and sum(whole for _, whole in warm) < _LOADS_SECONDS:
        warm.append(_first_token(task))
    return {
        "first token, cold": cold,
        "first token, warm": statistics.median(first for first, _ in warm),
        "whole process, warm": statistics.median(whole for _, whole in warm),
    }


def _first_token(task: Task) -> tuple[float, float]:
    cells = (Cell("", "load", input=256, output=1),)
    with _worker(task, "first-token", task.options(cells)) as worker:
        answer = worker.answer(task.deadline)
        if "time" not in answer:
            raise Failed(answer.get("error", "no time"))
        worker.process.wait(task.deadline)
        return answer["time"] - worker.started, time.time() - worker.started


def _serve(task: Task) -> dict[str, float]:
    cells = GROUPS["server"]
    if not task.engine.server:
        raise Failed("it brings no server that takes requests as they come")
    if task.engine.server == "library":
        return _serve_in_process(task, cells)
    return measure_server(
        lambda port: task.command("server", task.options(cells, port)),
        environment(task.engine, task.threads),
        task.vocab_size,
        (CLIENTS, CLIENT_INPUT, CLIENT_OUTPUT),
        task.deadline,
    )


def _serve_in_process(task: Task, cells: tuple[Cell, ...]) -> dict[str, float]:
    answer = ask(task, task.options(cells), _request(cells[0]))
    if "error" in answer:
        raise Failed(answer["error"])
    streams = [Stream(times[0], times[1:], CLIENT_OUTPUT) for times in answer["streams"]]
    return summary(streams, CLIENTS, CLIENT_OUTPUT)


def _request(cell: Cell) -> dict[str, Any]:
    return asdict(cell) | {"times": REQUESTS_PER_CLIENT}


def _guarded(group: str, work: Any) -> tuple[dict[str, float], dict[str, str]]:
    try:
        return work(), {}
    except (Failed, OSError, subprocess.SubprocessError, TimeoutError) as error:
        return {}, {cell.name: f"{error}"[:300] for cell in GROUPS[group]}


class _Worker:
    def __init__(self, process: subprocess.Popen[str], started: float, log: Path) -> None:
        self.process, self.started, self._log = process, started, log

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise Failed(self._why()) from None
        return self.answer(seconds)

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next one. A worker that takes longer than `seconds` is ended."""
        assert self.process.stdout is not None
        begun = time.time()
        timer = threading.Timer(seconds, os.killpg, (self.process.pid, signal.SIGKILL))
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            late = time.time() - begun >= seconds
            raise Failed(f"no answer within {seconds:g} s" if late else self._why())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def finish(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.answer(seconds)

    def _why(self) -> str:
        self.process.wait()
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"its worker ended with {self.process.returncode}: {' / '.join(lines[-1:])[-200:]}"


@contextmanager
def _worker(task: Task, name: str, options: str) -> Iterator[_Worker]:
    """A process group of its own, for as long as it is asked."""
    log = WORK / "logs" / f"{name}.{task.engine.folder}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file, tempfile.TemporaryDirectory() as directory:
        started = time.time()
        process = subprocess.Popen(
            task.command(name, options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            cwd=directory,
            env=environment(task.engine, task.threads),
            process_group=0,
        )
        try:
            yield _Worker(process, started, log)
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """A worker ends when its requests do; one that does not is ended with all that it started."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process.stdout.close()
