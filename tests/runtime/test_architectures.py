"""Engines against transformers: the same greedy tokens in fp32, the same logprobs, on every target."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import enginery
import numpy as np
import pytest
import torch
from enginery import SamplingParams
from enginery.compiler.build import BuildRequest, build, prepare
from enginery.engines.targets import TARGETS, host_features, missing_features
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3 import modeling_gemma3

from ..tiny import CASES, VOCAB, greedy, logits, make_checkpoint

RUNNABLE = [
    name
    for name, target in TARGETS.items()
    if name.startswith("cpu-") and not missing_features(target, host_features())
]
RANDOM = np.random.default_rng(11)
PROMPTS = [[int(token) for token in RANDOM.integers(3, 250, length)] for length in (1, 6, 33, 90)]
# Beyond 48 tokens a longrope engine keeps the factors that a sequence began with; transformers changes them on the way.
CHANGES_ON_THE_WAY = {"phi3-longrope": [[*PROMPTS[1]], [*PROMPTS[3]]]}


def compiled(model: Path, output: Path, **options: Any) -> Path:
    with prepare(BuildRequest(str(model), output, **({"target": "cpu", "precision": "fp32"} | options))) as prepared:
        return build(prepared)


def generate(engine: Path, prompts: list[list[int]], count: int, **knobs: Any) -> list[list[int]]:
    with enginery.Engine.load(engine, max_num_batched_tokens=48, max_num_seqs=4, num_threads=2, **knobs) as loaded:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        return [output.outputs[0].token_ids for output in loaded.generate(prompts, params)]


def reference(case: str, model: Any, prompt: list[int], count: int) -> list[int]:
    if hasattr(model.model.rotary_emb, "max_seq_len_cached"):  # dynamic scaling remembers earlier sequences
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return greedy(model, prompt, count)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_fp32_gives_the_greedy_tokens_of_transformers(case: str, tmp_path: Path) -> None:
    model = make_checkpoint(case, tmp_path / "model")
    prompts, count = CHANGES_ON_THE_WAY.get(case, PROMPTS), 40 if case in CHANGES_ON_THE_WAY else 64
    wanted = [reference(case, model, prompt, count) for prompt in prompts]
    assert generate(compiled(tmp_path / "model", tmp_path / "engine"), prompts, count) == wanted


THRESHOLD = 48  # of the case phi3-longrope


def pinned(model: Any, *, long: bool) -> Any:
    """transformers' model with one set of longrope factors, whatever the length."""
    rope = model.model.rotary_emb
    frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](model.config, "cpu", seq_len=THRESHOLD + 1)
    if long:
        rope.original_inv_freq.copy_(frequencies)
    else:
        rope.long_inv_freq = rope.original_inv_freq
    return model


@pytest.mark.parametrize(
    ("length", "long"), [(6, False), (33, False), (THRESHOLD, False), (THRESHOLD + 1, True), (90, True)]
)
def test_longrope_keeps_the_factors_that_a_sequence_began_with(length: int, long: bool, tmp_path: Path) -> None:
    prompt = PROMPTS[3][:length]
    model = pinned(make_checkpoint("phi3-longrope", tmp_path / "model"), long=long)
    other = pinned(make_checkpoint("phi3-longrope", tmp_path / "other"), long=not long)
    wanted = greedy(model, prompt, 64)
    assert wanted != greedy(other, prompt, 64)
    engine = compiled(tmp_path / "model", tmp_path / "engine")
    assert generate(engine, [prompt], 64) == [wanted]


def cached_and_tokens(loaded: enginery.Engine, prompt: list[int]) -> tuple[int, list[int]]:
    output = loaded.generate([prompt], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0]
    return output.num_cached_tokens, output.outputs[0].token_ids


def test_longrope_shares_prefixes_only_among_prompts_of_the_same_factors(tmp_path: Path) -> None:
    """A block of state holds 32 tokens, and all prompts begin alike."""
    make_checkpoint("phi3-longrope", tmp_path / "model")
    engine = compiled(tmp_path / "model", tmp_path / "engine")
    with enginery.Engine.load(engine, enable_prefix_caching=False) as loaded:
        fresh = {length: cached_and_tokens(loaded, PROMPTS[3][:length])[1] for length in (40, 48, 49, 60, 90)}
    with enginery.Engine.load(engine) as loaded:
        got = {length: cached_and_tokens(loaded, PROMPTS[3][:length]) for length in (40, 90, 48, 49, 60)}
    assert {length: cached for length, (cached, _) in got.items()} == {40: 0, 90: 0, 48: 32, 49: 32, 60: 32}
    assert {length: tokens for length, (_, tokens) in got.items()} == fresh


def test_dynamic_scaling_shares_long_prefixes_only_among_prompts_of_one_length(tmp_path: Path) -> None:
    """Up to 48 tokens nothing is scaled; above, every length has frequencies of its own."""
    make_checkpoint("llama-dynamic", tmp_path / "model")
    engine = compiled(tmp_path / "model", tmp_path / "engine")
    ends = [[*PROMPTS[3][: length - 1], end] for length, end in ((40, 5), (48, 6), (80, 7), (81, 8), (80, 9))]
    with enginery.Engine.load(engine, enable_prefix_caching=False) as loaded:
        fresh = [cached_and_tokens(loaded, prompt)[1] for prompt in ends]
    with enginery.Engine.load(engine) as loaded:
        cached, tokens = zip(*(cached_and_tokens(loaded, prompt) for prompt in ends), strict=True)
    assert cached == (0, 32, 0, 0, 64)
    assert list(tokens) == fresh


@pytest.mark.parametrize("case", ["llama-odd-sizes", "phi3-longrope", "gemma3_text-softcap"])
@pytest.mark.parametrize("target", RUNNABLE)
def test_every_target_gives_the_logits_of_transformers(case: str, target: str, tmp_path: Path) -> None:
    model = make_checkpoint(case, tmp_path / "model")
    engine = compiled(tmp_path / "model", tmp_path / "engine", target=target)
    vocab = model.config.vocab_size
    with enginery.Engine.load(engine, max_num_batched_tokens=32, max_num_seqs=8) as loaded:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=vocab)
        output = loaded.generate([PROMPTS[3]], params)[0]
    assert output.prompt_logprobs is not None
    raw = torch.tensor(logits(model, PROMPTS[3]))
    wanted = torch.log_softmax(raw, -1).numpy()
    entries = [entry for entry in output.prompt_logprobs if entry is not None]
    got = np.array([[entry[token].logprob for token in range(vocab)] for entry in entries])
    assert np.abs(got - wanted[:-1]).max() < 1e-4 * float(raw.abs().max())


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma3_text-softcap"])
def test_epsilons_and_soft_caps_are_those_of_the_config(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' Gemma 3 has the cap in its attention, but does not pass the config's on."""
    kind, changes = CASES[case]
    changed = changes | {"rms_norm_eps": 0.3}
    if "gemma" in case:
        changed["attn_logit_softcapping"] = 1.5
        capped = partial(modeling_gemma3.eager_attention_forward, softcap=1.5)
        monkeypatch.setattr(modeling_gemma3, "eager_attention_forward", capped)
    monkeypatch.setitem(CASES, case, (kind, changed))
    model = make_checkpoint(case, tmp_path / "model")
    wanted = [greedy(model, prompt, 32) for prompt in PROMPTS]
    assert generate(compiled(tmp_path / "model", tmp_path / "engine"), PROMPTS, 32) == wanted


@pytest.mark.parametrize("case", ["llama-biases", "llama-tied-llama3", "qwen2-window", "gemma3_text"])
def test_two_ranks_give_the_tokens_of_one(case: str, tmp_path: Path) -> None:
    make_checkpoint(case, tmp_path / "model")
    one, two = (compiled(tmp_path / "model", tmp_path / f"tp{n}", tensor_parallel_size=n) for n in (1, 2))
    assert generate(two, PROMPTS, 64) == generate(one, PROMPTS, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_checkpoints_are_widened_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path / "model", dtype, max_shard_size="30KB")
    wanted = [greedy(model, prompt, 32) for prompt in PROMPTS]
    assert generate(compiled(tmp_path / "model", tmp_path / "engine"), PROMPTS, 32) == wanted


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("kv_cache_dtype", ["fp32", "bf16", "int8"])
def test_batched_chunked_cached_and_alone_are_the_same(precision: str, kv_cache_dtype: str, tmp_path: Path) -> None:
    """Bit for bit: the logprobs too."""
    make_checkpoint("qwen3", tmp_path / "model")
    options = {"precision": precision, "kv_cache_dtype": kv_cache_dtype}
    engine = compiled(tmp_path / "model", tmp_path / "engine", **options)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=3)

    def run(prompts: list[list[int]], **knobs: Any) -> list[Any]:
        with enginery.Engine.load(engine, **({"max_num_seqs": 8} | knobs)) as loaded:
            outputs = loaded.generate(prompts, params) if knobs.pop("twice", None) is None else []
            outputs = loaded.generate(prompts, params)  # now from the prefix cache
            return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]

    alone = [run([prompt], max_num_batched_tokens=256, enable_prefix_caching=False)[0] for prompt in PROMPTS]
    assert run(PROMPTS, max_num_batched_tokens=256) == alone
    assert run(PROMPTS, max_num_batched_tokens=17, num_threads=1) == alone
    tight = 5 * 32 * 1024 * (4 if kv_cache_dtype == "fp32" else 2)
    policy = "max_utilization"
    assert run(PROMPTS, kv_cache_memory_bytes=tight, capacity_scheduler_policy=policy, max_model_len=128) == alone


def test_vocabulary_and_padding_rows_never_show(tmp_path: Path) -> None:
    """Token ids stay below the vocabulary's size though packed heads are padded to 16 rows."""
    make_checkpoint("llama", tmp_path / "model")
    engine = compiled(tmp_path / "model", tmp_path / "engine", precision="int8")
    with enginery.Engine.load(engine) as loaded:
        params = SamplingParams(temperature=2.0, max_tokens=200, ignore_eos=True, seed=3)
        tokens = loaded.generate([PROMPTS[0]], params)[0].outputs[0].token_ids
    assert max(tokens) < VOCAB
