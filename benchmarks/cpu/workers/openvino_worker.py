"""OpenVINO GenAI: its continuous batching pipeline, which is under its LLMPipeline too. Its KV cache has 8 bits."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from worker import Options, Prompts, Times, Worker, log_softmax_at, main

_KV_GIB = 2


class OpenVino(Worker):
    """Models converted by optimum-intel, weights quantized per channel (int8) or per group (int4)."""

    def convert(self, checkpoint: Path, model: Path, precision: str) -> None:
        command = [str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino", "--model", str(checkpoint)]
        command += ["--task", "text-generation-with-past", "--weight-format", precision]
        if precision == "int4":
            command += ["--sym", "--group-size", "64", "--ratio", "1.0"]
        subprocess.run([*command, str(model)], check=True, stdout=sys.stderr)

    def load(self, model: Path, options: Options) -> None:
        import openvino_genai

        self._genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = _KV_GIB
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = max(options.sequences, 32)
        properties = {"INFERENCE_NUM_THREADS": options.threads, "PERFORMANCE_HINT": "LATENCY"}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self._requests = 0
        self._model, self._request = model, None

    def add(self, prompt: list[int], output: int) -> Any:
        """A request's handle."""
        import numpy as np
        import openvino

        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = output
        config.ignore_eos = True
        config.do_sample = False
        self._requests += 1
        tensor = openvino.Tensor(np.array([prompt], np.int64))
        return self._pipeline.add_request(self._requests, tensor, config)

    def generate(self, prompts: Prompts, output: int) -> Times:
        started = time.perf_counter()
        handles = [self.add(prompt, output) for prompt in prompts]
        times: Times = [[] for _ in prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for handle, sequence in zip(handles, times, strict=True):
                sequence.extend([time.perf_counter() - started] * read_tokens(handle))
        return times

    def logprobs(self, prompt: list[int]) -> list[float]:
        """By the model that the pipeline is made of, which gives all logits."""
        import numpy as np
        import openvino

        if self._request is None:
            properties = {"INFERENCE_NUM_THREADS": self.options.threads, "PERFORMANCE_HINT": "LATENCY"}
            compiled = openvino.Core().compile_model(self._model / "openvino_model.xml", "CPU", properties)
            self._request = compiled.create_infer_request()
        self._request.reset_state()
        length = len(prompt)
        inputs = {
            "input_ids": np.array([prompt], np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        logits = self._request.infer(inputs)[0]
        return log_softmax_at(logits[0, :-1], prompt[1:])

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._pipeline.get_tokenizer().encode(text).input_ids.data[0].tolist()
        return ids

    def clients(self, clients: int, length: int, output: int, times: int) -> list[list[float]]:
        """Its package brings no server: each client's next request is added as soon as its last one has ended."""
        streams: list[list[float]] = []
        running: dict[int, tuple[Any, list[float], int]] = {}
        left = [times] * clients
        while any(left) or running:
            for client in range(clients):
                if left[client] and client not in running:
                    left[client] -= 1
                    asked = [time.perf_counter()]
                    running[client] = (self.add(self.prompts(1, length)[0], output), asked, 0)
            self._pipeline.step()
            for client, (handle, stream, count) in list(running.items()):
                if new := read_tokens(handle):
                    stream.append(time.perf_counter())
                    running[client] = (handle, stream, count + new)
                    if count + new == output:
                        streams.append(stream)
                        del running[client]
        return streams


def read_tokens(handle: Any) -> int:
    """How many tokens of a request are new."""
    if not handle.can_read():
        return 0
    return sum(len(output.generated_ids) for output in handle.read().values())


if __name__ == "__main__":
    main(OpenVino())
