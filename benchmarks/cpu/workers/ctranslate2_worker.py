"""CTranslate2: its Generator, which batches what it is given at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from worker import Options, Prompts, Worker, main


class CTranslate2(Worker):
    """Models converted by its own converter for transformers."""

    def convert(self, checkpoint: Path, model: Path, precision: str) -> None:
        command = [str(Path(sys.executable).parent / "ct2-transformers-converter"), "--model", str(checkpoint)]
        command += ["--output_dir", str(model), "--quantization", precision]
        subprocess.run(command, check=True, stdout=sys.stderr)

    def load(self, model: Path, options: Options) -> None:
        import ctranslate2

        self._generator = ctranslate2.Generator(
            str(model), device="cpu", compute_type=options.precision, inter_threads=1, intra_threads=options.threads
        )
        self._tokens = json.loads((model / "vocabulary.json").read_text())

    def generate(self, prompts: Prompts, output: int) -> tuple[float | None, float]:
        texts = [[self._tokens[token] for token in prompt] for prompt in prompts]
        seen: set[int] = set()
        first: list[float] = []

        def on_token(step: Any) -> bool:
            seen.add(step.batch_id)
            if len(seen) == len(prompts) and not first:
                first.append(time.perf_counter() - started)
            return False

        started = time.perf_counter()
        results = self._generator.generate_batch(
            texts,
            max_length=output,
            min_length=output,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=on_token,
        )
        seconds = time.perf_counter() - started
        if any(len(result.sequences_ids[0]) != output for result in results):
            raise RuntimeError(f"a sequence has not {output} tokens")
        return first[0], seconds


if __name__ == "__main__":
    main(CTranslate2())
