"""`--layer-precision`: which weights are held how, and that the engine computes what it should."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import enginery
import pytest
from enginery import SamplingParams
from enginery.compiler.build import BuildRequest, build, prepare
from enginery.engines.errors import CompileError
from enginery.engines.manifest import read_manifest

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-stories" / "model"
TEXT = list(range(5, 120))


def request(*layers: str, output: Path | None = None, **options: object) -> BuildRequest:
    return BuildRequest(str(MODEL), output, layer_precisions=layers, **options)  # type: ignore[arg-type]


def layouts(*layers: str, **options: object) -> dict[str, str]:
    """Of every matrix, by its name."""
    with prepare(request(*layers, **options)) as prepared:
        jobs = prepared.ranks[0].jobs.jobs
        return {name: job.tensor.layout for name, job in jobs.items() if "int" in job.tensor.layout}


def of(found: dict[str, str], pattern: str) -> set[str]:
    return {layout for name, layout in found.items() if fnmatchcase(name, pattern)}


def test_patterns_name_modules_as_the_checkpoint_does() -> None:
    usual = layouts(precision="int4")
    found = layouts("*.down_proj=int8", "model.layers.1.*.o_proj=int8", precision="int4")
    differ = {name for name in usual if usual[name] != found[name]}
    assert differ == {name for name in usual if "down_proj" in name or ("layers.1." in name and "o_proj" in name)}
    assert {found[name] for name in differ} == {"int8_k4n16.v0"}


def test_the_last_pattern_counts() -> None:
    layers = ("*_proj=int8", "*.2.mlp.down_proj=int4", "*.down_proj=int8", "*.0.mlp.down_proj=int4")
    found = layouts(*layers, precision="int4")
    assert {name for name in found if "int4" in found[name]} == {name for name in found if "0.mlp.down_proj" in name}


def test_modules_of_one_product_have_the_most_exact_precision_of_theirs() -> None:
    usual, found = layouts(precision="int4"), layouts("*.1.*.k_proj=int8", precision="int4")
    (name,) = [name for name in usual if usual[name] != found[name]]
    assert "layers.1." in name
    assert found[name] == "int8_k4n16.v0"
    with pytest.raises(CompileError) as refusal:
        layouts("*.1.*.k_proj=int4", precision="int8")
    assert "model.layers.1.self_attn.k_proj has int8, not int4: it is one product with q_proj, v_proj" in str(
        refusal.value
    )
    assert found == layouts("*.1.*.[qkv]_proj=int8", precision="int4")


def test_a_head_of_codes_leaves_the_embedding_rows_of_eight_bits() -> None:
    usual, found = layouts(precision="int4"), layouts("lm_head=int4", precision="int4")
    (table,) = found.keys() - usual.keys()
    assert found[table] == "int8_k4n16.v0"
    assert found[table.removesuffix(".table")] == "int4_k8n16g32.v0"


def test_group_size_and_zero_points_are_of_what_is_int4() -> None:
    found = layouts("*.mlp.*=int4", precision="int8", group_size=64, zero_points=True)
    assert of(found, "*mlp*") == {"uint4_k8n16g64.v0"}
    assert of(found, "*self_attn*") == {"int8_k4n16.v0"}
    with pytest.raises(CompileError, match="--group-size belongs to --precision int4"):
        layouts("*.mlp.*=int8", precision="int8", group_size=64)


def test_everything_wrong_is_told_at_once() -> None:
    with pytest.raises(CompileError) as refusal:
        layouts("lm_head", "=int8", "x=bf16", precision="int4")
    for text in ("lm_head", "=int8", "x=bf16"):
        assert f"wanted PATTERN=int8 or int4, as lm_head=int4 or '*.down_proj=int8', got {text!r}" in str(refusal.value)
    with pytest.raises(CompileError) as refusal:
        layouts("down_proj=int8", "lm_head=int8", "*.wq=int8", precision="int4")
    assert "'down_proj' matches no product of model.layers.*.self_attn.q_proj" in str(refusal.value)
    assert "'*.wq' matches no product" in str(refusal.value)
    assert "'lm_head' matches" not in str(refusal.value)


def test_no_more_than_a_manifest_holds() -> None:
    with pytest.raises(CompileError, match="1025 are too many; an engine has at most 1024"):
        layouts(*["lm_head=int8"] * 1025, precision="int4")
    for text in ("x" * 300 + "=int8", "[!\udc80]*=int8"):
        with pytest.raises(CompileError, match="wanted at most 256 printable characters"):
            layouts(text, precision="int4")


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "fp8", "target": "h100"}])
def test_other_precisions_have_no_such_layers(options: dict[str, str]) -> None:
    reason = f"this build is {options['precision']} for"
    with pytest.raises(CompileError, match=reason), prepare(request("lm_head=int8", **options)):
        pass


MIXES = {
    "head": ("int4", ("lm_head=int4",)),
    "some of eight bits": ("int4", ("*.down_proj=int8", "*.0.*=int8", "lm_head=int4")),
    "some of four bits": ("int8", ("*.2.*.o_proj=int4", "*.up_proj=int4", "*.gate_proj=int4")),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("target", ["cpu", "cpu-avx2"])
def test_engines_of_both_kinds_stay_near_fp32(mix: str, target: str, tmp_path: Path) -> None:
    precision, layers = MIXES[mix]
    exact = logprobs(tmp_path / "exact", precision="fp32", target=target)
    found = logprobs(tmp_path / "found", *layers, precision=precision, target=target)
    ranks = logprobs(tmp_path / "ranks", *layers, precision=precision, target=target, tensor_parallel_size=2)
    # On the average; what is computed wrongly is some whole units away.
    assert sum(abs(a - b) for a, b in zip(exact, found, strict=True)) / len(exact) < 0.5
    assert sum(abs(a - b) for a, b in zip(found, ranks, strict=True)) / len(exact) < 0.2
    assert found != exact
    assert read_manifest(tmp_path / "found").layer_precisions == layers


def logprobs(directory: Path, *layers: str, **options: object) -> list[float]:
    """Of every token of TEXT."""
    with prepare(request(*layers, output=directory, **options)) as prepared:
        build(prepared)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    with enginery.Engine.load(directory) as engine:
        (output,) = engine.generate([TEXT], params)
    assert output.prompt_logprobs is not None
    return [entry[token].logprob for entry, token in zip(output.prompt_logprobs, TEXT, strict=True) if entry]
