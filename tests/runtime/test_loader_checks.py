"""What the loader decides for the core, and the engines that it refuses because their parts contradict each other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import enginery
import pytest
from enginery.compiler.build import BuildRequest, build, prepare
from enginery.engines.errors import CapacityError, EngineFormatError, EngineryError, TargetError
from enginery.engines.manifest import Manifest, encode_manifest, hash_file, read_manifest
from enginery.engines.plan import Logits, Plan, PrefixKey, StateGroup
from enginery.engines.plan_format import decode_plan, encode_plan
from enginery.engines.targets import TARGETS
from enginery.runtime import loader
from enginery.runtime.config import EngineConfig
from enginery.runtime.files import open_engine
from enginery.runtime.loader import CoreSettings, check_target, read_ranks
from enginery.runtime.prepare import prepare_core

from ..tiny import make_checkpoint


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of two ranks and two state groups."""
    model, output = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("engine") / "tiny"
    make_checkpoint("qwen2-window", model)
    request = BuildRequest(str(model), output, "cpu-avx2", "int8", tensor_parallel_size=2, max_model_len=100)
    with prepare(request) as prepared:
        return build(prepared)


@pytest.fixture
def engine(two_ranks: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(two_ranks, tmp_path / "engine"))


def change_plan(engine: Path, rank: int, change: Callable[[Plan], Plan]) -> None:
    path = engine / f"plan.rank{rank}.msgpack"
    path.write_bytes(encode_plan(change(decode_plan(path.read_bytes(), "plan"))))
    manifest = read_manifest(engine)
    manifest.files[path.name] = hash_file(path, "plan", "msgpack", rank)
    (engine / "manifest.json").write_bytes(encode_manifest(manifest))


def change_manifest(engine: Path, change: Callable[[Manifest], Manifest]) -> None:
    (engine / "manifest.json").write_bytes(encode_manifest(change(read_manifest(engine))))


def settings(engine: Path, target: str = "cpu-avx2", **knobs: Any) -> CoreSettings:
    files = open_engine(engine)
    return prepare_core(files, read_ranks(files), TARGETS[target], EngineConfig(**knobs))


def test_every_knob_reaches_the_core(two_ranks: Path) -> None:
    given = settings(
        two_ranks,
        max_model_len=200,
        max_num_seqs=3,
        max_num_batched_tokens=50,
        enable_prefix_caching=False,
        capacity_scheduler_policy="max_utilization",
        num_threads=4,
    )
    assert given.max_model_len == 200
    assert given.config == {
        "max_model_len": 200,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 50,
        "mixed_prompt_tokens": 0,
        "enable_prefix_caching": False,
        "capacity_scheduler_policy": "max_utilization",
        "rope_threshold": 0,
        "rope_exact": False,
    }
    wanted = {"isa": "avx2", "num_threads": 4, "vocab_size": 301, "max_tokens": 50, "max_rows": 3, "max_sequences": 3}
    assert {name: given.spec[name] for name in wanted} == wanted
    assert [len(given.spec[name]) for name in ("ranks", "groups", "num_blocks")] == [2, 2, 2]
    assert settings(two_ranks, max_num_seqs=60, max_num_batched_tokens=7).spec["max_tokens"] == 60
    assert settings(two_ranks).config["mixed_prompt_tokens"] == 48


def test_the_length_is_the_builds_choice_until_somebody_gives_another(two_ranks: Path) -> None:
    assert settings(two_ranks).max_model_len == 100
    assert settings(two_ranks, max_model_len=7).max_model_len == 7
    assert settings(two_ranks, max_model_len=256).max_model_len == 256
    with pytest.raises(EngineryError, match="max_model_len 257: this model was made for at most 256"):
        settings(two_ranks, max_model_len=257)


def test_a_choice_beyond_the_model_is_cut(engine: Path) -> None:
    change_manifest(engine, lambda manifest: replace(manifest, default_max_model_len=1000))
    assert settings(engine).max_model_len == 256


@pytest.mark.parametrize(
    ("knob", "fine", "wrong"), [("tensor_parallel_size", 2, 1), ("kv_cache_dtype", "bf16", "int8")]
)
def test_what_is_baked_in_may_be_given_if_it_is_that(two_ranks: Path, knob: str, fine: Any, wrong: Any) -> None:
    settings(two_ranks, **{knob: fine})
    with pytest.raises(EngineryError, match=f"{knob} is baked into the engine as {fine}; {wrong} was asked for"):
        settings(two_ranks, **{knob: wrong})
    settings(two_ranks, kv_cache_dtype="auto")


def test_the_budget_is_of_all_ranks(two_ranks: Path) -> None:
    given = settings(two_ranks, kv_cache_memory_bytes=1 << 20)
    sizes = [group["block_bytes"] for group in given.spec["groups"]]
    used = 2 * sum(count * size for count, size in zip(given.spec["num_blocks"], sizes, strict=True))
    assert 0.8 * (1 << 20) < used <= 1 << 20


def test_operands_are_told_by_their_place(two_ranks: Path) -> None:
    files = open_engine(two_ranks)
    ranks, given = read_ranks(files), settings(two_ranks)
    for rank, spec in zip(ranks, given.spec["ranks"], strict=True):
        assert spec["weights_path"] == str(rank.weights_path)
        assert (spec["weights_file_bytes"], spec["logits_stride"]) == (rank.weights.size, rank.plan.logits.stride)
        assert spec["buffers"][spec["logits_buffer"]]["name"] == rank.plan.logits.buffer
        assert [buffer["per_thread"] for buffer in spec["buffers"]] == [b.per_thread for b in rank.plan.buffers]
        for call, called in zip(rank.plan.forward, spec["forward"], strict=True):
            assert (called["op"], called["region"], called["attributes"]) == (call.op, call.region, call.attributes)
            limit = min([128, *(guard.high for guard in call.guard if guard.variable == "tokens")])
            assert called["max_tokens"] == limit
            for name, operand in call.operands.items():
                told = called["operands"][name]
                lists = {"buffer": spec["buffers"], "weight": spec["weights"], "state": given.spec["groups"]}
                if operand.kind in lists:
                    assert lists[operand.kind][told["index"]]["name"] == operand.name
                if operand.kind == "weight":
                    assert told["layout"] == rank.weights.placed[operand.name].tensor.layout
                    assert told["bytes"] == operand.extent


def _other_group(plan: Plan) -> Plan:
    return replace(plan, state_groups=(replace(plan.state_groups[0], block_bytes=1), *plan.state_groups[1:]))


def _idle_group(plan: Plan) -> Plan:
    return replace(plan, state_groups=(*plan.state_groups, StateGroup("idle", "full", 0, 1, 32, 64, 1, 8, "f32")))


@pytest.mark.parametrize(
    ("rank", "change", "reason"),
    [
        (1, lambda plan: replace(plan, rank=0), "the plan of rank 1 of 2 says that it is rank 0 of 2"),
        (0, lambda plan: replace(plan, world_size=3), "the plan of rank 0 of 2 says that it is rank 0 of 3"),
        (1, _other_group, "the plans of rank 0 and rank 1 differ in their state"),
        (1, lambda plan: replace(plan, prefix_key=PrefixKey(5)), "the plans of rank 0 and rank 1 differ"),
        (0, lambda plan: replace(plan, logits=Logits(plan.logits.buffer, 300, 301)), "says a vocabulary of 301"),
        (0, lambda plan: replace(plan, state_groups=()), "the plan has no state group"),
        (0, _idle_group, "no call uses state group 'idle'"),
    ],
)
def test_plans_that_contradict_each_other_are_refused(
    engine: Path, rank: int, change: Callable[[Plan], Plan], reason: str
) -> None:
    change_plan(engine, rank, change)
    with pytest.raises(EngineFormatError, match=f"(?s)contradicts itself.*{reason}"):
        read_ranks(open_engine(engine))


def test_every_plan_is_held_to_its_bounds(engine: Path) -> None:
    change_plan(engine, 1, lambda plan: replace(plan, buffers=(replace(plan.buffers[0], bytes=64), *plan.buffers[1:])))
    with pytest.raises(EngineFormatError, match=r"plan\.rank1\.msgpack: .*reaches byte"):
        settings(engine)


@pytest.mark.parametrize("per_thread", [False, True])
def test_activations_beyond_reason_are_refused(engine: Path, per_thread: bool) -> None:
    def grow(plan: Plan) -> Plan:
        buffers = [replace(b, bytes=1 << 40) if b.per_thread == per_thread else b for b in plan.buffers]
        return replace(plan, buffers=tuple(buffers))

    change_plan(engine, 0, grow)
    with pytest.raises(CapacityError, match="of which no step of 128 tokens needs more than"):
        settings(engine)


def test_activations_and_scratch_must_fit_the_memory(two_ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "available_memory", lambda: 20 << 20)
    settings(two_ranks, kv_cache_memory_bytes=1 << 20, num_threads=2)
    with pytest.raises(CapacityError, match=r"128 tokens and 64 sequences on 40 threads; 20\.97 MB are free"):
        settings(two_ranks, kv_cache_memory_bytes=1 << 20, num_threads=40)


def test_a_plan_that_works_more_than_its_weights_allow_is_refused(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here as if an ordinary step touched next to nothing."""
    monkeypatch.setattr(loader, "_MOST_STEP_BYTES", 1 << 20)
    monkeypatch.setattr(loader, "_MOST_USES_OF_WEIGHTS", 0)
    with pytest.raises(EngineFormatError, match="in a step of 128 tokens; with weights of"):
        settings(engine)


@pytest.mark.parametrize("target", ["cpu-avx512-vnni", "tpu-v9"])
def test_the_command_for_another_machine_keeps_what_was_chosen(engine: Path, target: str) -> None:
    change_manifest(engine, lambda manifest: replace(manifest, target=target))
    wanted = "--target cpu --precision int8 --tensor-parallel-size 2 -o engine-cpu"
    with pytest.raises(TargetError, match=f"(?s)was built for {target}.*Build one for it: build-engine .* {wanted}"):
        check_target(open_engine(engine), ["avx2", "fma", "f16c", "bmi2"])


def test_the_command_for_another_machine_has_all_that_changes_the_model(engine: Path) -> None:
    layers = ("lm_head=int4", "*.0.*=int8")
    changes: dict[str, Any] = {"precision": "int4", "kv_cache_dtype": "int8", "layer_precisions": layers}
    change_manifest(engine, lambda m: replace(m, target="tpu-v9", calibration="0" * 64, **changes))
    with pytest.raises(TargetError) as caught:
        check_target(open_engine(engine), [])
    wanted = "--precision int4 --tensor-parallel-size 2 --kv-cache-dtype int8 --layer-precision lm_head=int4 "
    assert wanted + "--layer-precision '*.0.*=int8' --calibration FILE -o engine-cpu (and" in str(caught.value)


def test_a_prefix_is_found_again_unless_switched_off(built_engine: Path) -> None:
    params = enginery.SamplingParams(temperature=0, max_tokens=2)
    prompt = list(range(3, 83))
    for switch, cached in ((True, 64), (False, 0)):
        with enginery.Engine.load(built_engine, enable_prefix_caching=switch) as loaded:
            outputs = [loaded.generate([prompt], params)[0] for _ in range(2)]
        assert [output.num_cached_tokens for output in outputs] == [0, cached]
