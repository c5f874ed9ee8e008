"""enginery, as a user has it: every knob at its default but those that the task says."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

from worker import Options, Prompts, Worker, main


class Enginery(Worker):
    """The engine's Python API; its server is `run-engine`."""

    def convert(self, checkpoint: Path, model: Path, precision: str) -> None:
        command = [_command("build-engine"), str(checkpoint), "-o", str(model), "--precision", precision]
        subprocess.run(command, check=True, stdout=sys.stderr)

    def load(self, model: Path, options: Options) -> None:
        from enginery import Engine

        self._engine = Engine.load(
            model,
            num_threads=options.threads,
            max_model_len=options.context,
            max_num_seqs=options.sequences,
            enable_prefix_caching=False,
        )

    def generate(self, prompts: Prompts, output: int) -> tuple[float | None, float]:
        from enginery import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
        if len(prompts) == 1 and output > 1:
            return asyncio.run(self._stream(prompts[0], output))
        started = time.perf_counter()
        outputs = self._engine.generate(prompts, params)
        seconds = time.perf_counter() - started
        if any(len(each.outputs[0].token_ids) != output for each in outputs):
            raise RuntimeError(f"a sequence has not {output} tokens")
        return (seconds if output == 1 else None), seconds

    async def _stream(self, prompt: list[int], output: int) -> tuple[float, float]:
        from enginery import SamplingParams
        from enginery.runtime.requests import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=output,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        started, first = time.perf_counter(), 0.0
        async for _ in self._engine.generate_stream(prompt, params):
            first = first or time.perf_counter() - started
        return first, time.perf_counter() - started

    def server(self, model: Path, options: Options) -> None:
        knobs = {
            "port": options.port,
            "num-threads": options.threads,
            "max-model-len": options.context,
            "max-num-seqs": options.sequences,
            "served-model-name": "model",
        }
        command = [_command("run-engine"), str(model), "--no-enable-prefix-caching"]
        os.execv(command[0], command + [f"--{name}={value}" for name, value in knobs.items()])


def _command(name: str) -> str:
    return str(Path(sys.executable).parent / name)


if __name__ == "__main__":
    main(Enginery())
