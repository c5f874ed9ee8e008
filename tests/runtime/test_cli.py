"""The commands, as processes, on the repository's own model."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

RUN_ENGINE = [sys.executable, "-c", "from enginery.runtime.cli import run_engine; run_engine()"]
ENGINERY = [sys.executable, "-c", "from enginery.runtime.cli import enginery; enginery()"]


def run(command: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=60)


@contextmanager
def running(engine: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that is ready, and its URL."""
    command = [*RUN_ENGINE, str(engine), "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, (line, process.stderr and process.stderr.read())
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """The one message of a command that refused."""
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    return result.stderr


def test_serves_and_drains(built_engine: Path) -> None:
    with running(built_engine, "--served-model-name", "tiny") as (process, url):
        assert httpx.get(f"{url}/health").json()["status"] == "ready"
        body: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert process.wait(timeout=30) == 0


def test_answers_to_what_it_was_started_with(built_engine: Path) -> None:
    with running(built_engine) as (_, url):
        listed = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
        for name, status in ((listed[0], 200), (str(built_engine), 200), (built_engine.name, 200), ("other", 404)):
            body = {"model": name, "prompt": "Once", "max_tokens": 1}
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == status
        assert len(listed) == 1


def test_ends_at_once_without_time_to_drain(built_engine: Path) -> None:
    with running(built_engine, "--shutdown-timeout", "0") as (process, url):
        body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" or "error" in json.loads(rest[-1].removeprefix("data: "))
        assert process.wait(timeout=30) == 0


def test_a_second_signal_ends_at_once(built_engine: Path) -> None:
    with running(built_engine, "--shutdown-timeout", "600") as (process, url):
        body = {"prompt": ["Once"] * 1000, "max_tokens": 500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)  # now it is in flight
            process.send_signal(signal.SIGTERM)
            while (health := httpx.get(f"{url}/health").json())["status"] == "ready":
                pass
            assert health["status"] == "draining"
            assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}).status_code == 503
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 128 + signal.SIGTERM


def test_a_half_sent_body_does_not_hold_the_end_up(built_engine: Path) -> None:
    with running(built_engine, "--shutdown-timeout", "600") as (process, url):
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port or 80), timeout=30) as unfinished:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n"
            unfinished.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
            assert unfinished.recv(100).startswith(b"HTTP/1.1 100")  # now it is in flight
            process.send_signal(signal.SIGTERM)
            assert unfinished.recv(100).startswith(b"HTTP/1.1 503")
            assert process.wait(timeout=30) == 0


INTERRUPTING = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
from enginery.runtime.entry import {command}
{command}()
"""


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("click", "run_engine"),
        ("enginery.runtime.cli", "run_engine"),
        ("enginery.engines.sizes", "enginery"),
        ("enginery.runtime.serve", "run_engine"),
        ("asyncio", "run_engine"),
        ("enginery.runtime.server.state", "run_engine"),
        ("enginery.runtime.server.app", "run_engine"),
        ("uvicorn", "run_engine"),
        ("enginery.runtime.engine", "run_engine"),
        ("tokenizers", "run_engine"),
        ("enginery.runtime.inspect", "enginery"),
    ],
)
def test_an_interrupt_ends_quietly_whenever_it_comes(built_engine: Path, module: str, command: str) -> None:
    program = [sys.executable, "-c", INTERRUPTING.format(module=module, command=command)]
    arguments = ["--port", 0] if command == "run_engine" else []
    result = run(program, *(["inspect"] if command == "enginery" else []), built_engine, *arguments)
    # A server that runs already goes down in order.
    assert result.returncode in (130, 0) if command == "run_engine" else result.returncode == 130
    assert result.stderr == ""


def test_an_idle_server_takes_no_time(built_engine: Path) -> None:
    with running(built_engine) as (process, url):
        body = {"prompt": "Once", "max_tokens": 5}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        ticks = Path(f"/proc/{process.pid}/stat")

        def used() -> int:
            return sum(map(int, ticks.read_text().rsplit(")", 1)[1].split()[11:13]))

        def settled() -> bool:
            before = used()
            time.sleep(1)  # the idle time that is measured, nothing is waited for
            return used() - before <= 5

        # The weights are hashed in the background after the first token.
        assert any(settled() for _ in range(5))


def test_a_damaged_chunk_ends_serving(copied_engine: Path) -> None:
    weights = copied_engine / "weights.rank0.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5000] ^= 1
    weights.write_bytes(data)
    with running(copied_engine) as (process, _):
        assert process.wait(timeout=30) == 2
        assert process.stderr is not None
        assert "chunk 0" in process.stderr.read()
    assert "chunk 0" in refusal(run(RUN_ENGINE, copied_engine, "--port", 0, "--verify"))
    assert "chunk 0" in refusal(run(ENGINERY, "verify", copied_engine))


def test_port_in_use(built_engine: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refusal(run(RUN_ENGINE, built_engine, "--port", port))
    assert re.fullmatch(
        rf"EngineryError: 127\.0\.0\.1:{port} cannot be served on: Address already in use\..*\n", message
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-model-len", "1000000"], "this model was made for at most"),
        (["--kv-cache-memory-bytes", "1KiB"], "one sequence of max_model_len"),
        (["--kv-cache-memory-bytes", "much"], "is no size"),
        (["--tensor-parallel-size", "2"], "tensor_parallel_size is baked into the engine as 1; 2 was asked for"),
        (["--kv-cache-dtype", "fp32"], "kv_cache_dtype is baked into the engine as bf16"),
        (["--max-num-seq", "1"], "max-num-seqs"),
        (["--max_num_seqs", "1"], "--max-num-seqs"),
        (["--gpu-memory-utilization", "0.9"], "is --kv-cache-memory-bytes"),
        (["--quantization", "fp8"], "build-engine --precision"),
        (["-tp", "2"], "build-engine --tensor-parallel-size"),
        (["--port", "99999"], "wanted a whole number from 0 to 65535, got '99999'"),
        (["--port", "1e3"], "wanted a whole number from 0 to 65535, got '1e3'"),
        (["--port"], "requires an argument"),
        (["--max-num-seqs", "0"], "'--max-num-seqs': wanted a whole number from 1"),
        (["--max-num-batched-tokens", "9" * 30], "'--max-num-batched-tokens': wanted a whole number from 1"),
        (["--max-model-len", "-5"], "'--max-model-len': wanted a whole number from 1"),
        (["--num-threads", "two"], "'--num-threads': wanted a whole number from 1"),
        (["--shutdown-timeout", "nan"], "'--shutdown-timeout': wanted a number of seconds, 0 or more, got 'nan'"),
        (["--shutdown-timeout", "inf"], "'--shutdown-timeout': wanted a number of seconds, 0 or more, got 'inf'"),
        (["--shutdown-timeout", "-1"], "'--shutdown-timeout': wanted a number of seconds, 0 or more, got '-1'"),
        (["--shutdown-timeout", "soon"], "'--shutdown-timeout': wanted a number of seconds"),
        (["--kv-cache-memory-bytes", "nan"], "'nan' is no size"),
        (["--capacity-scheduler-policy", "best"], "guaranteed_no_evict"),
        (["more"], "unexpected extra argument"),
        (["--api-key", "key\n"], "without spaces around it"),
        (["--host", ""], "must not be empty"),
        (["--api-key", ""], "must not be empty"),
        (["--api-key", "k", "--served-model-name", ""], "must not be empty"),
        (["--host", "256.1.1.1"], "cannot be served on"),
    ],
)
def test_refusals(built_engine: Path, arguments: list[str], message: str) -> None:
    assert message in refusal(run(RUN_ENGINE, built_engine, "--port", 0, *arguments))


@pytest.mark.parametrize("arguments", [["--num-threds", "1"], ["--port", "x"], []])
def test_a_wrong_usage_is_one_line(arguments: list[str]) -> None:
    message = refusal(run(RUN_ENGINE, *arguments))
    assert message.startswith("UsageError: run-engine: ")
    assert message.endswith("See run-engine --help.\n")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspct", "x"], "'inspect'"),
        (["inspect"], "UsageError: enginery inspect: Missing argument 'DIRECTORY'."),
        (["verify", "x", "--jason"], "UsageError: enginery verify: No such option '--jason'."),
        (["--json"], "UsageError: enginery: No such option '--json'."),
        ([], "Commands:"),
    ],
)
def test_wrong_usage_of_enginery(arguments: list[str], message: str) -> None:
    assert message in refusal(run(ENGINERY, *arguments))


def test_an_engine_for_another_machine(copied_engine: Path) -> None:
    manifest = json.loads((copied_engine / "manifest.json").read_text())
    manifest["target"] = "cuda-sm90"
    (copied_engine / "manifest.json").write_text(json.dumps(manifest))
    message = refusal(run(RUN_ENGINE, copied_engine, "--port", 0))
    assert "was built for cuda-sm90" in message
    assert "build-engine" in message


def test_no_engine(tmp_path: Path) -> None:
    for command in ([*RUN_ENGINE], [*ENGINERY, "inspect"], [*ENGINERY, "verify"]):
        assert "no manifest.json" in refusal(run(command, tmp_path))
        assert "does not exist" in refusal(run(command, tmp_path / "nothing"))


def test_inspect(built_engine: Path) -> None:
    text = run(ENGINERY, "inspect", built_engine).stdout
    facts = json.loads(run(ENGINERY, "inspect", built_engine, "--json").stdout)
    assert facts["target"] in text
    assert facts["model"]["architecture"] in text
    assert {kernel["operator"] for kernel in facts["kernels"]} >= {"attention", "linear", "rms_norm"}
    assert (
        facts["total_bytes"]
        == sum(path.stat().st_size for path in built_engine.iterdir()) - (built_engine / "manifest.json").stat().st_size
    )


def test_verify(built_engine: Path) -> None:
    result = run(ENGINERY, "verify", built_engine)
    assert result.returncode == 0
    assert "FAILED" not in result.stdout + result.stderr
    assert result.stdout.endswith("sound.\n")
