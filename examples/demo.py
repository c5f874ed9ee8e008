"""The whole way once: build an engine from the model in this repository, serve it, ask it for a story, stop the server.

python examples/demo.py
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI

MODEL = Path(__file__).parent / "tiny-stories" / "model"
QUESTION = "Tell me a story."
COMMANDS = Path(sys.executable).parent


def main() -> None:
    """Runs the demo and prints its table."""
    with tempfile.TemporaryDirectory(prefix="enginery-demo-") as directory:
        engine = Path(directory) / "tiny-stories"
        started = time.monotonic()
        run("build-engine", str(MODEL), "-o", str(engine))
        built = time.monotonic() - started
        size = sum(path.stat().st_size for path in engine.iterdir())
        with serve(engine) as (url, loaded):
            first, rate, count = ask(url)
    rows = [
        ("build", f"{built:.2f} s"),
        ("engine", f"{size / 1e6:.2f} MB"),
        ("load, process start to ready", f"{loaded:.2f} s"),
        ("time to first token", f"{first * 1e3:.1f} ms"),
        ("tokens/s, one stream", f"{rate:,.0f} ({count} tokens)"),
    ]
    print()
    for name, value in rows:
        print(f"{name:30} {value:>20}")


def run(command: str, *arguments: str) -> None:
    """Runs one of the package's commands, shown first."""
    print(f"$ {command} {' '.join(arguments)}", flush=True)
    subprocess.run([COMMANDS / command, *arguments], check=True)


@contextmanager
def serve(engine: Path) -> Iterator[tuple[str, float]]:
    """run-engine on a free port: its URL, and the seconds from process start until it was ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(COMMANDS / "run-engine"), str(engine), "--port", str(port), "--served-model-name", "tiny-stories"]
    print(f"$ run-engine {' '.join(command[1:])}", flush=True)
    started = time.monotonic()
    server = subprocess.Popen(command)
    try:
        url = f"http://127.0.0.1:{port}"
        while not healthy(url):
            if server.poll() is not None:
                sys.exit(f"run-engine ended with exit code {server.returncode}")
            if time.monotonic() - started > 60:
                sys.exit("run-engine was not ready within 60 seconds")
            time.sleep(0.01)
        yield url, time.monotonic() - started
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)
    if server.returncode:
        sys.exit(f"run-engine ended with exit code {server.returncode}")
    print("server stopped")


def healthy(url: str) -> bool:
    """True once requests can be served."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def ask(url: str) -> tuple[float, float, int]:
    """Streams the answer to the terminal. Returns seconds to the first token, tokens/s over all, and the count."""
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        # The client imports half of itself at the first stream: that is not the server's time.
        list(client.completions.create(model="tiny-stories", prompt="Once", max_tokens=1, stream=True))
        print(f"\n> {QUESTION}", flush=True)
        started, first, count = time.monotonic(), 0.0, 0
        stream = client.chat.completions.create(
            model="tiny-stories",
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        print("answer: ", end="", flush=True)
        for chunk in stream:
            if chunk.usage is not None:
                count = chunk.usage.completion_tokens
            for choice in chunk.choices:
                if text := choice.delta.content:
                    first = first or time.monotonic() - started
                    # One line, so that whatever reads the output finds the whole answer on it.
                    print(text.replace("\n", " "), end="", flush=True)
        seconds = time.monotonic() - started
        print()
    return first, count / seconds, count


if __name__ == "__main__":
    if shutil.which(str(COMMANDS / "run-engine")) is None:
        sys.exit("enginery is not installed beside this Python: run `make demo`.")
    main()
