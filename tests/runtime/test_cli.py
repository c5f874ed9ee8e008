"""The commands, as processes, on the repository's own model."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
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
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port or 80)) as unfinished:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n"
            unfinished.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
            assert unfinished.recv(100).startswith(b"HTTP/1.1 100")  # now it is in flight
            process.send_signal(signal.SIGTERM)
            while (health := httpx.get(f"{url}/health").json())["status"] == "ready":
                pass
            assert health["status"] == "draining"
            assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}).status_code == 503
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 128 + signal.SIGTERM


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
        (["--port", "99999"], "99999"),
        (["--api-key", ""], "must not be empty"),
        (["--api-key", "k", "--served-model-name", ""], "must not be empty"),
        (["--host", "256.1.1.1"], "cannot be served on"),
    ],
)
def test_refusals(built_engine: Path, arguments: list[str], message: str) -> None:
    assert message in refusal(run(RUN_ENGINE, built_engine, "--port", 0, *arguments))


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
