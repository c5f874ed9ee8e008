"""transformers on torch: `generate` in bf16 with scaled dot product attention."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from worker import Options, Prompts, Worker, main


class Transformers(Worker):
    """Loads the checkpoint as it is."""

    def convert(self, checkpoint: Path, model: Path, precision: str) -> None:
        shutil.copytree(checkpoint, model)

    def load(self, model: Path, options: Options) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(options.threads)
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa")
        self._model.eval()

    def generate(self, prompts: Prompts, output: int) -> tuple[float | None, float]:
        times: list[float] = []

        def on_token(ids: Any, _scores: Any, **_rest: Any) -> Any:
            times.append(time.perf_counter() - started)
            return self._torch.zeros(len(ids), dtype=self._torch.bool)

        from transformers import StoppingCriteriaList

        ids = self._torch.tensor(prompts)
        started = time.perf_counter()
        with self._torch.inference_mode():
            made = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=output,
                min_new_tokens=output,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([on_token]),
            )
        seconds = time.perf_counter() - started
        if made.shape[1] != ids.shape[1] + output:
            raise RuntimeError(f"a sequence has not {output} tokens")
        return times[0], seconds


if __name__ == "__main__":
    main(Transformers())
