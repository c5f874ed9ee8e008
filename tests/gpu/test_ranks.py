"""Two ranks on the one GPU that is here: what one rank gives, as launches and as graphs, and what a late rank costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import enginery
import numpy as np
import pytest
from enginery import SamplingParams

from ..tiny import greedy
from .test_engines import BOUND, PROMPT, built

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

CASES = [
    ("llama", "bf16", "auto"),
    ("llama-tied-llama3", "fp8", "fp8"),
    ("qwen2", "int8", "int8"),
    ("gemma3_text", "bf16", "auto"),
    ("phi3-partial", "bf16", "auto"),
]


def logprobs(engine: Path, **knobs: Any) -> np.ndarray[Any, Any]:
    """Of the prompt's own tokens."""
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0, ignore_eos=True)
    with enginery.Engine.load(engine, max_model_len=200, **knobs) as loaded:
        output = loaded.generate([PROMPT], params)[0]
    assert output.prompt_logprobs is not None
    return np.array([next(iter(each.values())).logprob for each in output.prompt_logprobs[1:] if each is not None])


@pytest.mark.parametrize(("case", "precision", "kv_cache_dtype"), CASES)
def test_two_ranks_give_what_one_gives(case: str, precision: str, kv_cache_dtype: str, tmp_path: Path) -> None:
    options = {"precision": precision, "kv_cache_dtype": kv_cache_dtype}
    alone, _ = built(case, tmp_path / "one", **options)
    ranks, _ = built(case, tmp_path / "two", tensor_parallel_size=2, **options)
    wanted = logprobs(alone)
    for knobs in ({}, {"max_num_batched_tokens": 16, "max_num_seqs": 4}):
        assert np.abs(logprobs(ranks, gpus=(0, 0), **knobs) - wanted).mean() < BOUND[precision], knobs


def test_thousands_of_meetings(tmp_path: Path) -> None:
    """Sequences that come and go, so that steps of every form follow one another: no signal is lost."""
    engine, model = built("llama", tmp_path, precision="bf16", tensor_parallel_size=2)
    chance = np.random.default_rng(1)
    prompts = [[int(token) for token in chance.integers(3, 250, length)] for length in chance.integers(1, 90, 60)]
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    with enginery.Engine.load(engine, max_model_len=200, max_num_seqs=8, gpus=(0, 0)) as loaded:
        first = [output.outputs[0].token_ids for output in loaded.generate(prompts, params)]
        second = [output.outputs[0].token_ids for output in loaded.generate(prompts[:4], params)]
    agree = [np.mean(np.array(a) == np.array(b)) for a, b in zip(first, second, strict=False)]
    assert np.median(agree) > 0.9, agree
    wanted = [greedy(model, prompt, 12) for prompt in prompts[:9]]
    near = [np.mean(np.array(a[:12]) == np.array(b)) for a, b in zip(first, wanted, strict=False)]
    assert np.median(near) > 0.9, near
