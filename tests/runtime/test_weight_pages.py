"""Where weights lie: in their file's pages, or in huge pages that they are copied to while steps go on."""

from __future__ import annotations

import mmap
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from enginery import Engine, SamplingParams
from enginery.compiler.build import BuildRequest, build, prepare
from enginery.engines.errors import EngineryError
from transformers import Qwen3Config

from ..tiny import write_model

PARAMS = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, detokenize=False)
PROMPTS = [[5 + index, 6, 7] for index in range(6)]
SETTLED_S = 60.0


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 100 MB, mostly of a vocabulary: what a sample is worth for, and more than a piece of what is copied."""
    directory = tmp_path_factory.mktemp("large")
    config = Qwen3Config(
        vocab_size=90_000,
        hidden_size=512,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    write_model(config, directory / "model")
    with prepare(BuildRequest(str(directory / "model"), directory / "engine", precision="bf16")) as prepared:
        return build(prepared)


def is_mapped(directory: Path) -> bool:
    """Whether this process has pages of the weights' file mapped."""
    return f"{directory.resolve()}/weights." in Path("/proc/self/maps").read_text()


def flags_of_mapping(directory: Path) -> set[str]:
    """VmFlags of this process's mapping of the weights' file."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if f"{directory.resolve()}/weights." in line:
            return set(next(line for line in lines if line.startswith("VmFlags:")).split()[1:])
    return set()


def tokens(engine: Engine) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in engine.generate(PROMPTS, PARAMS)]


@pytest.fixture
def wanted(large: Path) -> Iterator[list[list[int]]]:
    with Engine.load(large, weight_pages="mapped", enable_prefix_caching=False) as engine:
        yield tokens(engine)


def test_a_mapping_asks_for_huge_pages(large: Path) -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has no transparent huge pages")
    with Engine.load(large, weight_pages="mapped"):
        assert "hg" in flags_of_mapping(large)


def test_copied_under_steps_that_go_on(large: Path, wanted: list[list[int]]) -> None:
    with Engine.load(large, weight_pages="huge", enable_prefix_caching=False) as engine:
        assert is_mapped(large)
        while engine.wait_until_settled(0) is None:
            assert tokens(engine) == wanted
        assert engine.wait_until_settled() == engine.stats()["weights_in"] == "copied to huge pages"
        assert tokens(engine) == wanted
        # wanted's engine has the file mapped: none of its pages is this one's.
        weights = engine.stats()["memory"]["weights"]
        anonymous = [int(size) for size in re.findall(r"Anonymous: +(\d+) kB", Path("/proc/self/smaps").read_text())]
        assert sum(anonymous) * 1024 > weights


def test_of_several_ranks(tmp_path: Path, large: Path) -> None:
    model = large.parent / "model"
    with prepare(BuildRequest(str(model), tmp_path / "engine", precision="int8", tensor_parallel_size=2)) as prepared:
        directory = build(prepared)
    found = []
    for pages in ("mapped", "huge"):
        with Engine.load(directory, weight_pages=pages) as engine:
            engine.generate([[5]], replace(PARAMS, max_tokens=1))
            engine.wait_until_settled(SETTLED_S)
            assert is_mapped(directory) == (pages == "mapped")
            found.append(tokens(engine))
    assert found[0] == found[1]
    assert not is_mapped(directory)


def test_a_sample_decides(large: Path) -> None:
    with Engine.load(large) as engine:
        engine.generate([[5]], replace(PARAMS, max_tokens=1))
        told = engine.wait_until_settled(SETTLED_S)
    assert told is not None
    rates = re.fullmatch(
        r"(left in the pages of their file|copied to huge pages) \(read at ([\d.]+) GB/s, in huge pages at ([\d.]+)\)",
        told,
    )
    assert rates is not None, told
    faster = float(rates[3]) / float(rates[2])
    assert faster > 1.09 if rates[1].startswith("copied") else faster < 1.11


@pytest.mark.parametrize("pages", ["auto", "mapped"])
def test_small_weights_stay(pages: str, built_engine: Path) -> None:
    with Engine.load(built_engine, weight_pages=pages) as engine:
        engine.generate([[5]], replace(PARAMS, max_tokens=1))
        assert engine.wait_until_settled(SETTLED_S) == ""
        assert is_mapped(built_engine)


def test_what_is_closed_meanwhile_ends(large: Path) -> None:
    for _ in range(8):
        with Engine.load(large, weight_pages="huge") as engine:
            engine.generate([[5]], replace(PARAMS, max_tokens=1))


def test_weights_are_hashed_before(copied_engine: Path) -> None:
    (weights,) = copied_engine.glob("weights.*")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with Engine.load(copied_engine, weight_pages="huge") as engine:
        assert engine.wait_until_settled(SETTLED_S) == ""
        assert engine.failure is not None


def test_another_word_is_refused() -> None:
    with pytest.raises(EngineryError, match="weight_pages must be 'auto' or 'mapped' or 'huge', got 'small'"):
        Engine.load("engine", weight_pages="small")


def test_what_is_mapped_meanwhile_is_not_touched(large: Path) -> None:
    """Where a copy was before it is moved is anybody's: here somebody maps and uses memory all the time."""
    ended, wrong = threading.Event(), []

    def use_memory() -> None:
        while not ended.is_set():
            with mmap.mmap(-1, 32 << 20) as memory:
                memory[:: 1 << 20] = bytes(range(32))
                time.sleep(0)
                if memory[:: 1 << 20] != bytes(range(32)):
                    wrong.append(1)

    users = [threading.Thread(target=use_memory) for _ in range(2)]
    for user in users:
        user.start()
    try:
        for _ in range(3):
            with Engine.load(large, weight_pages="huge") as engine:
                engine.generate([[5]], replace(PARAMS, max_tokens=1))
                assert engine.wait_until_settled(SETTLED_S) == "copied to huge pages"
    finally:
        ended.set()
        for user in users:
            user.join()
    assert not wrong


def test_memory_that_is_promised_is_left_to_others(large: Path) -> None:
    """State of sequences that nobody has touched yet, more than the machine has left beside."""
    available = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line
    )
    with Engine.load(large, weight_pages="huge", kv_cache_memory_bytes=available - (200 << 20)) as engine:
        engine.generate([[5]], replace(PARAMS, max_tokens=1))
        told = engine.wait_until_settled(SETTLED_S)
    assert told == "left in the pages of their file, as memory for a copy is missing"
