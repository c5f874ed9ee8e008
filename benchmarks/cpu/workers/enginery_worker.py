"""enginery, as a user has it: every knob at its default but those that the task says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from worker import Options, Prompts, Times, Worker, main


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

    def generate(self, prompts: Prompts, output: int) -> Times:
        from enginery import SamplingParams
        from enginery.runtime.pump import Gathering

        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
        times: Times = [[] for _ in prompts]
        sinks = []
        started = time.perf_counter()
        for prompt, sequence in zip(prompts, times, strict=True):
            # What Engine.generate does with each prompt, but for this note.
            def take(delta: Any, sequence: list[float] = sequence) -> None:
                sequence.extend([time.perf_counter() - started] * len(delta.token_ids))

            sinks.append(Gathering(1, take))
            self._engine.start(prompt, params, sinks[-1])
        for sink in sinks:
            sink.done.wait()
        return times

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._engine.encode(text)
        return ids

    def logprobs(self, prompt: list[int]) -> list[float]:
        from enginery import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = self._engine.generate([prompt], params)
        assert output.prompt_logprobs is not None
        entries = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
        return [entry[token].logprob for entry, token in entries if entry is not None]

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
