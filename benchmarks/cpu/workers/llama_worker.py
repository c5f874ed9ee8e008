"""llama.cpp by its own programs, and ik_llama.cpp, which has the same ones. LLAMA_BIN is where they lie.

llama-batched-bench measures prefill and decode, each in a process of its own: its figures have no sampling in them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from worker import Options, Prompts, Times, Worker, main

# A short prompt is measured so often, in one process.
_REPEATS = {512: 5, 2048: 2}


class Llama(Worker):
    """GGUF files, written by llama_gguf.py and quantized by llama-quantize."""

    def convert(self, checkpoint: Path, model: Path, precision: str) -> None:
        from llama_gguf import write_gguf

        model.mkdir(parents=True)
        plain = model / "plain.gguf"
        write_gguf(checkpoint, plain)
        if precision == "BF16":
            plain.rename(model / "model.gguf")
            return
        command = [_program("llama-quantize"), str(plain), str(model / "model.gguf"), precision]
        subprocess.run(command, check=True, stdout=sys.stderr)
        plain.unlink()

    def load(self, model: Path, options: Options) -> None:
        self._model = str(model / "model.gguf")

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        batch, length, output = (request[name] for name in ("batch", "input", "output"))
        decode = request["kind"] == "decode"
        times = 1 if decode else _REPEATS.get(length, 1)
        sizes = {
            "npp": ",".join([str(length)] * times),
            "ntg": output,
            "npl": batch,
            "c": batch * (length + output + 8),
        }
        command = [_program("llama-batched-bench"), "-m", self._model, "--output-format", "jsonl"]
        command += ["-t", str(self.options.threads)]
        for name, value in sizes.items():
            command += [f"-{name}", str(value)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        rows = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
        if answer.returncode or len(rows) != times:
            raise RuntimeError(f"llama-batched-bench: {(answer.stderr or answer.stdout).strip()[-300:]}")
        return {"value": statistics.median(row["speed_tg" if decode else "speed_pp"] for row in rows)}

    def generate(self, prompts: Prompts, output: int) -> Times:
        """Through its Python binding, which only first-token uses."""
        if sys.argv[1] != "first-token":
            return []
        from llama_cpp import Llama as Binding

        started = time.perf_counter()
        options = {"n_threads": self.options.threads, "n_ctx": self.options.context, "verbose": False}
        binding = Binding(self._model, **options)
        binding.eval(prompts[0])
        binding.sample(temp=0.0)
        return [[time.perf_counter() - started]]

    def server(self, model: Path, options: Options) -> None:
        knobs = {
            "-m": model / "model.gguf",
            "-t": options.threads,
            "-np": options.sequences,
            "-c": options.sequences * options.context,
            "--host": "127.0.0.1",
            "--port": options.port,
        }
        flags = [str(part) for pair in knobs.items() for part in pair]
        os.execv(_program("llama-server"), [_program("llama-server"), *flags])


def _program(name: str) -> str:
    return str(Path(os.environ["LLAMA_BIN"]) / name)


if __name__ == "__main__":
    main(Llama())
