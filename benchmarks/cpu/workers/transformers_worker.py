"""transformers on torch: `generate` in bf16 with scaled dot product attention."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from worker import Options, Prompts, Times, Worker, log_softmax_at, main


class Transformers(Worker):
    """Loads the checkpoint as it is."""

    def convert(self, checkpoint: Path, model: Path, precision: str) -> None:
        shutil.copytree(checkpoint, model)

    def load(self, model: Path, options: Options) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(options.threads)
        self._torch, self._path = torch, model
        model_class: Any = AutoModelForCausalLM
        self._model = model_class.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    def generate(self, prompts: Prompts, output: int) -> Times:
        from transformers import StoppingCriteriaList

        steps: list[float] = []

        def on_token(ids: Any, _scores: Any, **_rest: Any) -> Any:
            steps.append(time.perf_counter() - started)
            return self._torch.zeros(len(ids), dtype=self._torch.bool)

        ids = self._torch.tensor(prompts)
        started = time.perf_counter()
        with self._torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=output,
                min_new_tokens=output,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([on_token]),
            )
        return [steps] * len(prompts)

    def logprobs(self, prompt: list[int]) -> list[float]:
        with self._torch.inference_mode():
            logits = self._model(self._torch.tensor([prompt])).logits[0, :-1].float().numpy()
        return log_softmax_at(logits, prompt[1:])

    def encode(self, text: str) -> list[int]:
        from transformers import AutoTokenizer

        ids: list[int] = AutoTokenizer.from_pretrained(self._path).encode(text)
        return ids


if __name__ == "__main__":
    main(Transformers())
