"""llama.cpp by its own programs, and ik_llama.cpp, which has the same ones. LLAMA_BIN is where they lie.

llama-batched-bench measures prefill and decode, each in a process of its own: its figures have no sampling in them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from worker import Options, Prompts, Times, Worker, log_softmax_at, main

# A short prompt is measured so often, in one process.
_REPEATS = {512: 5, 2048: 2}
# Columns of its table: PP, TG, B, N_KV, T_PP, S_PP, T_TG, S_TG, T, S.
_PP, _TG = 5, 7


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

    _binding: Any = None

    def load(self, model: Path, options: Options) -> None:
        self._model = str(model / "model.gguf")

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        batch, length, output = (request[name] for name in ("batch", "input", "output"))
        decode = request["kind"] == "decode"
        times = 1 if decode else _REPEATS.get(length, 1)
        rows = self._bench([length] * times, output, batch)
        return {"value": statistics.median(row[_TG if decode else _PP] for row in rows)}

    def _bench(self, lengths: list[int], output: int, batch: int) -> list[list[float]]:
        """The rows of its table: tokens/s of prefill and of decode are two of the columns."""
        sizes = {"npp": ",".join(map(str, lengths)), "ntg": output, "npl": batch}
        sizes |= {"c": batch * (max(lengths) + output + 8), "t": self.options.threads}
        flags = [part for name, value in sizes.items() for part in (f"-{name}", str(value))]
        command = [_program("llama-batched-bench"), "-m", self._model, *flags]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        rows = table_rows(f"{answer.stdout}\n{answer.stderr}")  # llama.cpp prints it, ik_llama.cpp logs it
        if answer.returncode or len(rows) != len(lengths):
            raise RuntimeError(f"llama-batched-bench: {(answer.stderr or answer.stdout).strip()[-300:]}")
        return rows

    def encode(self, text: str) -> list[int]:
        """Only first-token asks: its Python binding is loaded then."""
        try:
            from llama_cpp import Llama as Binding
        except ImportError:  # ik_llama.cpp has none, and its program no text
            return [0] * (len(text) // 4)
        options = {"n_threads": self.options.threads, "n_ctx": self.options.context, "verbose": False}
        self._binding = Binding(self._model, **options)
        return list(self._binding.tokenize(text.encode()))

    def logprobs(self, prompt: list[int]) -> list[float]:
        if self._binding is None:
            try:
                from llama_cpp import Llama as Binding
            except ImportError:
                raise RuntimeError("it has no Python binding to ask for logits") from None
            self._binding = Binding(
                self._model, n_threads=self.options.threads, n_ctx=len(prompt), logits_all=True, verbose=False
            )
        self._binding.reset()
        self._binding.eval(prompt)
        return log_softmax_at(self._binding.scores[: len(prompt) - 1], prompt[1:])

    def generate(self, prompts: Prompts, output: int) -> Times:
        started = time.perf_counter()
        if self._binding is not None:
            self._binding.eval(prompts[0])
            self._binding.sample(temp=0.0)
        elif sys.argv[1] == "first-token":
            self._bench([len(prompts[0])], output, 1)
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


def table_rows(text: str) -> list[list[float]]:
    """The lines of figures between bars."""
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[float(field) for field in fields] for fields in lines if fields[0].strip().isdigit()]


def _program(name: str) -> str:
    return str(Path(os.environ["LLAMA_BIN"]) / name)


if __name__ == "__main__":
    main(Llama())
