"""Rows of which the largest logits alone are kept draw as those do whose logits are all there."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from enginery import Engine, SamplingParams
from enginery.compiler.build import BuildRequest, build, prepare
from enginery.engines.errors import EngineryError
from enginery.runtime import _core
from safetensors.numpy import load_file, save_file

from .conftest import MODEL

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.3, max_tokens=24, ignore_eos=True, seed=7)
PARAMS = [
    GREEDY,
    *(replace(DRAWN, top_k=top_k) for top_k in (1, 2, 7, 64, 65, 400)),
    replace(DRAWN, top_k=40, top_p=0.7),
    replace(DRAWN, top_k=40, min_p=0.1),
    replace(DRAWN, top_k=5, temperature=0.01),
    replace(DRAWN, top_k=20, temperature=1e6),
    replace(DRAWN, top_p=0.9),
    replace(DRAWN, top_k=20, presence_penalty=1.0),
    replace(GREEDY, logit_bias={5: 3.0}),
    replace(GREEDY, prompt_logprobs=1),
]


def targets() -> list[str]:
    features = set(_core.cpu_features())
    wanted = {"cpu-avx2": {"avx2"}, "cpu-avx2-vnni": {"avxvnni"}, "cpu-avx512": {"avx512f"}}
    return [target for target, needed in wanted.items() if needed <= features] + ["cpu"]


def build_engine(model: Path, output: Path, **options: str) -> Path:
    with prepare(BuildRequest(str(model), output, **options)) as prepared:  # type: ignore[arg-type]
        return build(prepared)


@pytest.mark.parametrize("target", targets())
def test_tokens_do_not_depend_on_how_many_logits_are_kept(target: str, tmp_path: Path) -> None:
    """Logprobs need all of them: with logprobs every row has them, without only some have."""
    directory = build_engine(MODEL, tmp_path / "engine", target=target, precision="fp32" if target != "cpu" else "int8")
    prompts = [list(range(3, 4 + 3 * index)) for index in range(len(PARAMS))]
    with Engine.load(directory, max_num_seqs=len(PARAMS)) as engine:
        kept = engine.generate(prompts, PARAMS)
        whole = engine.generate(prompts, [replace(params, logprobs=0) for params in PARAMS])
        alone = [engine.generate([prompt], params)[0] for prompt, params in zip(prompts, PARAMS, strict=True)]
    wanted = [output.outputs[0].token_ids for output in whole]
    assert [output.outputs[0].token_ids for output in kept] == wanted
    assert [output.outputs[0].token_ids for output in alone] == wanted
    assert len({tuple(tokens) for tokens in wanted}) > len(PARAMS) // 2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_what_overflows_within_a_layer_is_told(precision: str, tmp_path: Path) -> None:
    """Though codes of eight bits have no word for it."""
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.post_attention_layernorm.weight"] *= 1e30  # gate and up too, and their product is infinite
    file.chmod(0o644)
    save_file(tensors, file, {"format": "pt"})
    with Engine.load(build_engine(model, tmp_path / "engine", precision=precision)) as engine:
        for params in (GREEDY, replace(GREEDY, logprobs=1)):
            with pytest.raises(EngineryError, match="after 3 tokens are not finite"):
                engine.generate([[5, 6, 7]], params)


def test_logits_that_are_not_finite_are_told_though_nobody_reads_them(tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    table = tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
    table[100] = 3e38  # the head's too: one logit of all
    file.chmod(0o644)
    save_file(tensors, file, {"format": "pt"})
    with Engine.load(build_engine(model, tmp_path / "engine", precision="fp32")) as engine:
        for params in (GREEDY, replace(DRAWN, top_k=4), replace(GREEDY, logprobs=1)):
            with pytest.raises(EngineryError, match="after 3 tokens are not finite"):
                engine.generate([[5, 6, 7]], params)
