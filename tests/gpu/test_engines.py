"""Engines on the GPU that is here: the logprobs of transformers, in whatever steps they are computed (`ci/gpu.sh`)."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import enginery
import numpy as np
import pytest
from enginery import SamplingParams
from enginery.compiler.build import BuildRequest, build, prepare

from ..tiny import greedy, logits, make_checkpoint

PROMPT = [int(token) for token in np.random.default_rng(0).integers(3, 250, 75)]
# Mean difference of the logprobs of the prompt's own tokens; random models are as sensitive as models get.
BOUND = {"bf16": 0.05, "int8": 0.15, "fp8": 0.4}
CASES = [
    ("llama", "bf16", "auto"),
    ("llama-biases", "fp8", "fp8"),
    ("qwen2", "int8", "int8"),
    ("qwen3", "fp8", "bf16"),
    ("mistral-window", "bf16", "fp8"),
    ("phi3-longrope", "bf16", "int8"),
    ("phi3-partial", "bf16", "auto"),
    ("gemma3_text", "bf16", "auto"),
    ("gemma3_text-softcap", "fp8", "fp8"),
    ("llama-odd-sizes", "int8", "auto"),
    ("llama-head-256", "bf16", "auto"),
]

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]


def target() -> str:
    """Of the first GPU."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True, check=True)
    return f"cuda-sm{answer.stdout.strip().replace('.', '')}"


def built(case: str, directory: Path, **options: Any) -> tuple[Path, Any]:
    model = make_checkpoint(case, directory / "model")
    request = BuildRequest(str(directory / "model"), directory / "engine", target=target(), num_threads=8, **options)
    with prepare(request) as prepared:
        return build(prepared), model


@pytest.mark.parametrize(("case", "precision", "kv_cache_dtype"), CASES)
def test_logprobs_are_those_of_transformers(case: str, precision: str, kv_cache_dtype: str, tmp_path: Path) -> None:
    engine, model = built(case, tmp_path, precision=precision, kv_cache_dtype=kv_cache_dtype)
    scores = np.asarray(logits(model, PROMPT), np.float64)
    wanted = scores - np.log(np.sum(np.exp(scores - scores.max(-1, keepdims=True)), -1, keepdims=True))
    wanted -= scores.max(-1, keepdims=True)
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0, ignore_eos=True)
    for knobs in ({}, {"max_num_batched_tokens": 16, "max_num_seqs": 4}):
        with enginery.Engine.load(engine, max_model_len=200, **knobs) as loaded:
            output = loaded.generate([PROMPT], params)[0]
        assert output.prompt_logprobs is not None
        got = [next(iter(each.values())).logprob for each in output.prompt_logprobs[1:] if each is not None]
        difference = np.abs(np.array(got) - wanted[np.arange(len(PROMPT) - 1), PROMPT[1:]])
        assert difference.mean() < BOUND[precision], knobs


def test_greedy_tokens_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """bf16 may round ties of a random model otherwise: most tokens must agree, and all of most prompts."""
    engine, model = built("llama", tmp_path, precision="bf16")
    prompts = [PROMPT[:length] for length in (3, 20, 33, 64, 75)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with enginery.Engine.load(engine, max_model_len=200) as loaded:
        together = [output.outputs[0].token_ids for output in loaded.generate(prompts, params)]
        alone = [loaded.generate([prompt], params)[0].outputs[0].token_ids for prompt in prompts]
    wanted = [greedy(model, prompt, 24) for prompt in prompts]
    for got in (together, alone):
        agree = [np.mean(np.array(a) == np.array(b)) for a, b in zip(got, wanted, strict=True)]
        assert np.median(agree) > 0.9, agree
