"""Loading an engine: what it is given, and what a directory may hold."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import enginery
import pytest
from enginery import EngineryError, SamplingParams
from enginery.engines.errors import CapacityError, EngineFormatError, TargetError
from enginery.engines.plan import StateGroup
from enginery.runtime.capacity import StateShape, choose_blocks
from enginery.runtime.files import open_engine
from enginery.runtime.loader import check_target
from enginery.runtime.verify import verify_engine
from hypothesis import given
from hypothesis import strategies as st

GREEDY = SamplingParams(temperature=0, max_tokens=20)


def test_the_whole_way(built_engine: Path) -> None:
    with enginery.Engine.load(built_engine, verify=True) as engine:
        first, second = (engine.generate("Once upon a time", GREEDY)[0].outputs[0] for _ in range(2))
        assert first == second
        assert len(first.text) > 20
        assert engine.wait_until_verified()

        async def stream() -> str:
            return [output async for output in engine.generate_stream("Once upon a time", GREEDY)][-1].outputs[0].text

        assert asyncio.run(stream()) == first.text


def test_loading_brings_no_server(built_engine: Path) -> None:
    program = f"""import enginery, json, sys
with enginery.Engine.load({str(built_engine)!r}) as engine:
    engine.generate("Once", enginery.SamplingParams(max_tokens=1))
print(json.dumps(sorted(sys.modules)))"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    modules = json.loads(result.stdout)
    assert "enginery.runtime._core" in modules
    assert not {"starlette", "uvicorn", "click", "jinja2", "torch", "transformers", "onnx"} & set(modules)


def test_knobs_decide_the_memory(built_engine: Path) -> None:
    with enginery.Engine.load(built_engine, kv_cache_memory_bytes=1 << 20, max_model_len=128, max_num_seqs=2) as engine:
        assert 0.95 * (1 << 20) <= engine.stats()["memory"]["state"] <= 1 << 20
        assert engine.model.max_model_len == 128


@pytest.mark.parametrize(
    "knobs",
    [
        {"max_num_batched_tokens": 999_999_999},
        {"max_num_seqs": 100_000_000},
        {"num_threads": 5_000_000},
        {"kv_cache_memory_bytes": 1 << 50},
    ],
)
def test_knobs_beyond_the_memory_are_refused_by_name(built_engine: Path, knobs: dict[str, int]) -> None:
    with pytest.raises(CapacityError, match="--" + next(iter(knobs)).replace("_", "-")):
        enginery.Engine.load(built_engine, **knobs)


def replace(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return damage


def rewrite(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).write_bytes(content)

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "no tokenizer": lambda directory: (directory / "tokenizer.json").unlink(),
    "directory for weights": replace("weights.rank0.safetensors", Path.mkdir),
    "fifo for a plan": replace("plan.rank0.msgpack", os.mkfifo),
    "fifo for the manifest": replace("manifest.json", os.mkfifo),
    "link to nothing": replace("config.json", lambda path: path.symlink_to("/nowhere")),
    "device for a tokenizer": replace("tokenizer.json", lambda path: path.symlink_to("/dev/zero")),
    "truncated weights": lambda directory: os.truncate(directory / "weights.rank0.safetensors", 1000),
    "truncated plan": lambda directory: os.truncate(directory / "plan.rank0.msgpack", 100),
    "another template": rewrite("chat_template.jinja", b"x"),
    "deep manifest": rewrite("manifest.json", b"[" * 1_000_000),
    "empty manifest": rewrite("manifest.json", b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_directories_are_refused(copied_engine: Path, damage: str) -> None:
    DAMAGES[damage](copied_engine)
    with pytest.raises(EngineFormatError):
        enginery.Engine.load(copied_engine)
    assert not all(result.passed for result in verify_engine(copied_engine))


@pytest.mark.parametrize("name", ["tokenizer.json", "plan.rank0.msgpack", "config.json", "chat_template.jinja"])
def test_a_flipped_byte_is_found_before_use(copied_engine: Path, name: str) -> None:
    data = bytearray((copied_engine / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied_engine / name).write_bytes(data)
    with pytest.raises(EngineFormatError, match=f"{name}: damaged: the manifest says sha256"):
        enginery.Engine.load(copied_engine)


def test_a_flipped_byte_of_weights_is_found_while_serving(copied_engine: Path) -> None:
    path = copied_engine / "weights.rank0.safetensors"
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)
    with enginery.Engine.load(copied_engine) as engine, pytest.raises(EngineFormatError, match="chunk 0"):
        engine.wait_until_verified()
    with pytest.raises(EngineFormatError, match="chunk 0"):
        enginery.Engine.load(copied_engine, verify=True)


def test_all_missing_files_are_named_at_once(copied_engine: Path) -> None:
    (copied_engine / "tokenizer.json").unlink()
    (copied_engine / "config.json").unlink()
    with pytest.raises(EngineFormatError, match=r"(?s)config\.json.*tokenizer\.json"):
        enginery.Engine.load(copied_engine)


def test_another_isa_is_refused_with_the_command(built_engine: Path) -> None:
    with pytest.raises(
        TargetError, match=r"(?s)was built for cpu-.*this machine is none.*\nBuild one for it: build-engine"
    ):
        check_target(open_engine(built_engine), ["sse2"])


def test_links_to_files_are_fine(copied_engine: Path, built_engine: Path) -> None:
    (copied_engine / "tokenizer.json").unlink()
    (copied_engine / "tokenizer.json").symlink_to(built_engine / "tokenizer.json")
    enginery.Engine.load(copied_engine).close()


def test_end_tokens_come_from_generation_config_first(copied_engine: Path) -> None:
    from enginery.engines.manifest import encode_manifest, hash_file, read_manifest
    from enginery.runtime.model import read_model

    for name, document, wanted in (
        ("generation_config.json", {"eos_token_id": [3, 4]}, (3, 4)),
        ("generation_config.json", {"eos_token_id": 5, "temperature": 0.7, "top_k": 20}, (5,)),
        ("generation_config.json", {}, (9,)),
    ):
        (copied_engine / name).write_text(json.dumps(document))
        (copied_engine / "config.json").write_text(json.dumps({"eos_token_id": 9}))
        manifest = read_manifest(copied_engine)
        for changed, role in ((name, "generation"), ("config.json", "config")):
            manifest.files[changed] = hash_file(copied_engine / changed, role, "json")
        (copied_engine / "manifest.json").write_bytes(encode_manifest(manifest))
        model = read_model(open_engine(copied_engine), 64)
        assert model.stop_token_ids == wanted
        assert model.suggested == {key: document[key] for key in ("temperature", "top_k") if key in document}


def group(kind: str, window: int, layers: int) -> StateGroup:
    return StateGroup(kind, kind, window, layers, 32, 1024 * layers, 2, 16, "bf16")


GROUPS = (group("full", 0, 4), group("window", 64, 20))


@given(
    st.sampled_from([GROUPS[:1], GROUPS[1:], GROUPS]),
    st.integers(1, 4),
    st.integers(1, 4096),
    st.integers(1, 64),
    st.integers(1, 1 << 30),
)
def test_blocks_fit_the_budget_and_one_sequence(
    groups: tuple[StateGroup, ...], ranks: int, length: int, num_seqs: int, budget: int
) -> None:
    shape = StateShape(groups, ranks, 128)
    if shape.sequence_bytes(length) > budget:
        with pytest.raises(CapacityError, match=str(shape.sequence_bytes(length))):
            choose_blocks(shape, length, num_seqs, budget)
        longest = shape.longest_sequence(budget, length)
        assert longest < length
        assert longest == 0 or choose_blocks(shape, longest, num_seqs, budget)
        return
    blocks = choose_blocks(shape, length, num_seqs, budget)
    used = sum(count * each.block_bytes * ranks for count, each in zip(blocks, groups, strict=True))
    assert used <= budget
    assert all(count >= shape.blocks_of_sequence(each, length) for count, each in zip(blocks, groups, strict=True))
    if len(groups) == 1 and not groups[0].window:
        assert budget - used < groups[0].block_bytes * ranks


def test_windows_never_take_more_than_their_sequences_need() -> None:
    full, window = choose_blocks(StateShape(GROUPS, 1, 128), 4096, 8, 1 << 30)
    assert window == 8 * StateShape(GROUPS, 1, 128).blocks_of_sequence(GROUPS[1], 4096)
    assert full > window


def test_errors_are_of_one_family() -> None:
    assert issubclass(CapacityError, EngineryError)
