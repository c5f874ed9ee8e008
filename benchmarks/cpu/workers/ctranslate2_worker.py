"""CTranslate2: its Generator, which batches what it is given at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from worker import Options, Prompts, Times, Worker, main


class CTranslate2(Worker):
    """Models converted by its own converter for transformers."""

    def convert(self, checkpoint: Path, model: Path, precision: str) -> None:
        command = [str(Path(sys.executable).parent / "ct2-transformers-converter"), "--model", str(checkpoint)]
        command += ["--copy_files", "tokenizer.json", "--output_dir", str(model), "--quantization", precision]
        subprocess.run(command, check=True, stdout=sys.stderr)

    def load(self, model: Path, options: Options) -> None:
        import ctranslate2

        self._generator = ctranslate2.Generator(
            str(model), device="cpu", compute_type=options.precision, inter_threads=1, intra_threads=options.threads
        )
        self._model = model
        self._tokens = json.loads((model / "vocabulary.json").read_text())

    def generate(self, prompts: Prompts, output: int) -> Times:
        texts = [[self._tokens[token] for token in prompt] for prompt in prompts]
        times: Times = [[] for _ in prompts]

        def on_token(step: Any) -> bool:
            times[step.batch_id].append(time.perf_counter() - started)
            return False

        started = time.perf_counter()
        self._generator.generate_batch(
            texts,
            max_length=output,
            min_length=output,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=on_token,
        )
        return times

    def logprobs(self, prompt: list[int]) -> list[float]:
        (result,) = self._generator.score_batch([[self._tokens[token] for token in prompt]])
        return list(result.log_probs)

    def encode(self, text: str) -> list[int]:
        """It brings no tokenizer; of those that its documentation uses, this one loads fastest."""
        from tokenizers import Tokenizer

        ids: list[int] = Tokenizer.from_file(str(self._model / "tokenizer.json")).encode(text).ids
        return ids


if __name__ == "__main__":
    main(CTranslate2())
