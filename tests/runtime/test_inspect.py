"""`enginery inspect` and `enginery verify`: numbers over all ranks, kernels by variant, every check named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from enginery.compiler.build import BuildRequest, build, prepare
from enginery.engines.defaults import (
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    SHARED_SCRATCH_BYTES,
    THREAD_SCRATCH_BYTES,
    step_limits,
)
from enginery.engines.manifest import encode_manifest, hash_file, read_manifest
from enginery.engines.plan import plan_arena
from enginery.engines.targets import host_features
from enginery.runtime.cli import enginery
from enginery.runtime.files import open_engine
from enginery.runtime.inspect import describe_engine, inspect_engine
from enginery.runtime.loader import read_ranks
from enginery.runtime.verify import CheckResult, verify_engine

from ..tiny import make_checkpoint


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, output = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("engine") / "tiny"
    make_checkpoint("qwen2-window", model)
    request = BuildRequest(str(model), output, "cpu-avx2", "int8", tensor_parallel_size=2, max_model_len=100)
    with prepare(request) as prepared:
        return build(prepared)


@pytest.fixture
def engine(two_ranks: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_ranks, tmp_path / "engine"))


@pytest.fixture(scope="module")
def facts(two_ranks: Path) -> dict[str, Any]:
    return inspect_engine(two_ranks)


def test_memory_is_that_of_all_ranks(facts: dict[str, Any], two_ranks: Path) -> None:
    ranks = read_ranks(open_engine(two_ranks))
    arenas = [plan_arena(rank.plan, step_limits(MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, 4)) for rank in ranks]
    groups = ranks[0].plan.state_groups
    blocks = {"full": 4, "window21": 4}  # of 32 tokens for 100
    wanted = {
        "activations": sum(arena.arena_bytes + SHARED_SCRATCH_BYTES for arena in arenas),
        "activations_per_thread": max(arena.per_thread_bytes + THREAD_SCRATCH_BYTES for arena in arenas),
        "weights": sum((two_ranks / f"weights.rank{rank}.safetensors").stat().st_size for rank in (0, 1)),
        "state_per_token": 2 * sum(group.block_bytes // 32 for group in groups),
        "state_per_sequence": 2 * sum(blocks[group.name] * group.block_bytes for group in groups),
    }
    assert facts["memory"] == wanted


def test_lengths_are_the_builds_and_the_models(facts: dict[str, Any]) -> None:
    assert (facts["max_model_len"], facts["model"]["max_model_len"]) == (100, 256)
    text = describe_engine(facts)
    assert "100 tokens (the model's own: 256)" in text
    assert "2 layers, window 21, bf16, blocks of 32 tokens" in text
    assert "1 layers, full, bf16" in text
    assert "int8, KV cache bf16" in text


def test_a_revision_is_told(facts: dict[str, Any]) -> None:
    changed = facts | {"model": facts["model"] | {"revision": "abc123", "source": "owner/name"}}
    assert "owner/name at abc123 (qwen2, " in describe_engine(changed)
    assert " at " not in describe_engine(facts).splitlines()[0]


def test_kernels_are_counted_by_variant(facts: dict[str, Any], two_ranks: Path) -> None:
    counts = {(kernel["operator"], kernel["variant"]): kernel["calls"] for kernel in facts["kernels"]}
    calls = sum(len(rank.plan.instructions) for rank in read_ranks(open_engine(two_ranks)))
    assert sum(counts.values()) == calls
    assert counts["attention", "out f32, full bf16"] == 2
    assert counts["attention", "out f32, window bf16"] == 4
    gated = [variant for operator, variant in counts if operator == "linear" and "silu_gated" in variant]
    assert any("tokens ≤ 4" in variant for variant in gated)
    assert any("tokens ≥ 5" in variant for variant in gated)
    assert all("a i8, int8_k4n16.v0, out f32" in variant for variant in gated)


def results(engine: Path) -> dict[str, CheckResult]:
    return {result.name: result for result in verify_engine(engine)}


def test_a_sound_engine_passes_every_check(two_ranks: Path) -> None:
    found = results(two_ranks)
    names = ["manifest", "files", "hashes", "tokenizer", "model", "template", "plans", "bounds", "kernels", "weights"]
    assert list(found) == names
    assert all(result.passed for result in found.values())
    details = {name: result.detail for name, result in found.items()}
    assert details["manifest"] == "qwen2 int8 for cpu-avx2"
    assert details["plans"].startswith("2 ranks, ")
    assert details["weights"] == "2 chunks as they were built"
    assert "end tokens 2" in details["model"]
    assert details["template"] == "compiles"


def sign(engine: Path, name: str, content: bytes) -> None:
    manifest = read_manifest(engine)
    entry = manifest.files[name]
    (engine / name).write_bytes(content)
    manifest.files[name] = hash_file(engine / name, entry.role, entry.format, entry.rank)
    (engine / "manifest.json").write_bytes(encode_manifest(manifest))


def failed(engine: Path) -> list[str]:
    return [name for name, result in results(engine).items() if not result.passed]


def test_each_check_finds_its_damage(engine: Path, two_ranks: Path) -> None:
    files = {path.name: path.read_bytes() for path in two_ranks.iterdir()}

    def restore() -> None:
        for name, content in files.items():
            (engine / name).write_bytes(content)

    (engine / "tokenizer_config.json").write_bytes(files["tokenizer_config.json"][:-1] + b" ")
    assert "hashes" in failed(engine)
    restore()
    sign(engine, "tokenizer.json", b"{}")
    assert failed(engine) == ["tokenizer"]
    restore()
    settings = json.loads(files["tokenizer_config.json"]) | {"chat_template": "{% if %}"}
    sign(engine, "tokenizer_config.json", json.dumps(settings).encode())
    assert failed(engine) == ["template"]
    detail = results(engine)["template"].detail
    assert "chat template cannot be used: Expected an expression, got 'end of statement block'" in detail
    assert "It is the checkpoint's own" in detail
    result = CliRunner().invoke(enginery, ["verify", str(engine)])
    assert result.exit_code == 2
    assert result.stderr.endswith("not sound. Mend the checkpoint.\n")
    (engine / "tokenizer.json").write_bytes(b"{}")
    assert CliRunner().invoke(enginery, ["verify", str(engine)]).stderr.endswith("or build it again.\n")
    restore()
    sign(engine, "plan.rank1.msgpack", b"\x80")
    assert failed(engine) == ["plans"]
    restore()
    weights = bytearray(files["weights.rank1.safetensors"])
    weights[-100] ^= 1
    (engine / "weights.rank1.safetensors").write_bytes(weights)
    assert failed(engine) == ["weights"]
    restore()
    (engine / "config.json").unlink()
    assert failed(engine) == ["files"]


def test_kernels_of_another_machine_are_not_checked(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enginery.runtime._core.cpu_features", lambda: ["avx2", "fma", "bmi2"])
    kernels = results(engine)["kernels"]
    assert kernels.passed is None
    assert kernels.detail == "not checked: this machine is none of the CPU targets and lacks f16c"
    assert "avx2" in host_features()


def test_a_target_that_is_not_known_fails_its_bounds(engine: Path) -> None:
    manifest = replace(read_manifest(engine), target="tpu-v9")
    (engine / "manifest.json").write_bytes(encode_manifest(manifest))
    found = results(engine)
    assert found["bounds"].passed is False
    assert "tpu-v9" in found["bounds"].detail
    assert "kernels" not in found


def test_a_length_that_no_machine_holds_is_no_fault(engine: Path) -> None:
    manifest = read_manifest(engine)
    model = replace(manifest.model, max_model_len=1 << 31)
    (engine / "manifest.json").write_bytes(encode_manifest(replace(manifest, model=model)))
    assert failed(engine) == []
