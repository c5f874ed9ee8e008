"""A decoding step as a graph gives what the same launches give one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from enginery.engines.targets import TARGETS
from enginery.runtime import _core
from enginery.runtime.config import EngineConfig
from enginery.runtime.files import open_engine
from enginery.runtime.gpus import find_gpus
from enginery.runtime.loader import CoreSettings, read_ranks
from enginery.runtime.prepare import prepare_core
from numpy.typing import NDArray

from ..runtime.cuda_engines import build_shell, make_step
from .test_engines import built

CASES = [("llama", "bf16", "auto"), ("llama-biases", "fp8", "fp8"), ("gemma3_text", "int8", "int8")]


def settings(engine: Path, on_gpu: bool) -> CoreSettings:
    files = open_engine(engine)
    target = TARGETS[files.manifest.target]
    config = EngineConfig(max_num_seqs=13, max_num_batched_tokens=300, kv_cache_memory_bytes=8 << 20)
    return prepare_core(files, read_ranks(files), target, config, find_gpus(files, target, config) if on_gpu else None)


def decode_three_ways(made: CoreSettings, num_sequences: int) -> list[NDArray[np.float32]]:
    """Logits of one decoding step: as a graph, launched (a row is missing, so it is none), and as a graph again."""
    lengths = [(0, 20 + 11 * index) for index in range(num_sequences)]
    ends = list(np.cumsum([new for _, new in lengths]) - 1)
    decode = [(new, 1) for _, new in lengths]
    rows = list(range(num_sequences))
    steps = [make_step(lengths, ends), *(make_step(decode, these) for these in (rows, rows[:-1], rows))]
    return _core.run_forward(made.spec, steps, made.executor)[0][1:]


def check(made: CoreSettings, num_sequences: int) -> None:
    graph, launched, again = decode_three_ways(made, num_sequences)
    assert np.isfinite(graph).all()
    assert np.ptp(graph) > 0
    np.testing.assert_array_equal(again, graph)
    # Fewer rows may be computed in other tiles.
    np.testing.assert_allclose(launched, graph[:-1], rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.timeout(540)
@pytest.mark.parametrize(("case", "precision", "kv_cache_dtype"), CASES)
def test_graphs_equal_launches(case: str, precision: str, kv_cache_dtype: str, tmp_path: Path) -> None:
    engine = built(case, tmp_path, precision=precision, kv_cache_dtype=kv_cache_dtype)[0]
    for num_sequences in (2, 3, 5, 12):
        check(settings(engine, on_gpu=True), num_sequences)


def test_on_the_null_device(tmp_path: Path) -> None:
    engine = build_shell("llama", tmp_path, precision="fp8")
    check(settings(engine, on_gpu=False), 5)
