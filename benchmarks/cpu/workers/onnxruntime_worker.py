"""onnxruntime-genai: its Generator, one batch at a time."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from worker import Options, Prompts, Times, Worker, log_softmax_at, main


class OnnxRuntime(Worker):
    """Models written by its own builder; products take 8-bit activations (accuracy level 4)."""

    def convert(self, checkpoint: Path, model: Path, precision: str) -> None:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(model)]
        command += ["-p", precision, "-e", "cpu", "-c", str(model.with_suffix(".cache"))]
        command += ["--extra_options", "accuracy_level=4", "prune_lm_head=true"]
        subprocess.run(command, check=True, stdout=sys.stderr)

    def load(self, model: Path, options: Options) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        config: Any = onnxruntime_genai.Config(str(model))
        threads = f'{{"intra_op_num_threads": {options.threads}, "inter_op_num_threads": 1}}'
        config.overlay(f'{{"model": {{"decoder": {{"session_options": {threads}}}}}}}')
        self._model = onnxruntime_genai.Model(config)

    def generate(self, prompts: Prompts, output: int) -> Times:
        import numpy as np

        started = time.perf_counter()
        params = self._genai.GeneratorParams(self._model)
        length = len(prompts[0]) + output
        params.set_search_options(do_sample=False, batch_size=len(prompts), max_length=length, min_length=length)
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        steps = []
        while not generator.is_done():
            generator.generate_next_token()
            steps.append(time.perf_counter() - started)
        return [steps] * len(prompts)

    def logprobs(self, prompt: list[int]) -> list[float]:
        import numpy as np

        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, batch_size=1, max_length=len(prompt) + 1)
        generator = self._genai.Generator(self._model, params)
        rows = []
        for token in prompt[:-1]:  # the model gives logits of the last token only
            generator.append_tokens(np.array([[token]], np.int32))
            rows.append(np.array(generator.get_logits()).reshape(-1))
        return log_softmax_at(rows, prompt[1:])

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._genai.Tokenizer(self._model).encode(text).tolist()
        return ids


if __name__ == "__main__":
    main(OnnxRuntime())
