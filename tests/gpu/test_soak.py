"""Under load for a while: nothing fails, nothing leaks, every block is free at the end."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import enginery
import pytest
from enginery import SamplingParams
from enginery.runtime._core import cuda_gpu

from .http_load import Server, complete, serving
from .test_engines import built

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

NUM_REQUESTS, NUM_CLIENTS = 6000, 48
# Graphs of every size are made while the first half runs, and buffers of the host grow to their size.
GROWTH_BYTES = 96 << 20


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("llama", tmp_path_factory.mktemp("soak"), precision="fp8", kv_cache_dtype="fp8")[0]


def prompts(source: random.Random) -> list[int]:
    """Some share their beginnings."""
    begins = source.randrange(4)
    shared = [(begins * 31 + place) % 240 + 5 for place in range(source.choice([0, 0, 70, 130]))]
    return shared + [source.randrange(3, 250) for _ in range(source.choice([1, 2, 9, 40, 100]))]


def resident_bytes(process: int) -> int:
    """What it has in memory."""
    fields = Path(f"/proc/{process}/statm").read_text().split()
    return int(fields[1]) * 4096


async def load(server: Server, num_requests: int, seed: int) -> int:
    """Makes the requests, some of which are cut off; returns how many tokens came of the others."""
    source, left, tokens = random.Random(seed), [num_requests], [0]

    async def client() -> None:
        while left[0] > 0:
            left[0] -= 1
            hang_up = source.choice([None, None, None, 1, 5])
            options = {"max_tokens": source.choice([1, 3, 20, 90]), "temperature": source.choice([0, 0.8])}
            options |= source.choice([{}, {"top_p": 0.9}, {"top_k": 5}, {"logprobs": 2}, {"presence_penalty": 0.5}])
            answer = await complete(server, prompts(source), hang_up_after=hang_up, **options)
            assert not answer.error, answer.error
            assert answer.status == 200
            tokens[0] += answer.num_tokens

    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
    return tokens[0]


def test_over_http(engine: Path) -> None:
    with serving(engine, "--gpu-memory-utilization", "0.2", "--max-num-seqs", "32") as server:
        measured = []
        for half in range(2):
            assert asyncio.run(load(server, NUM_REQUESTS // 2, half)) > 0
            while (metrics := server.metrics())["num_requests_running"] or metrics["num_requests_waiting"]:
                pass
            assert metrics["kv_cache_usage_perc"] == 0
            measured.append((resident_bytes(server.process), cuda_gpu()["free_bytes"]))
        (first_host, first_free), (second_host, second_free) = measured
        assert second_host - first_host < GROWTH_BYTES
        assert first_free - second_free < GROWTH_BYTES


def test_in_one_process(engine: Path) -> None:
    """From several threads, with more sequences than the cache holds, and engines that come and go."""
    free = []
    for _ in range(3):
        with enginery.Engine.load(engine, kv_cache_memory_bytes="8MiB", max_model_len=256, max_num_seqs=24) as loaded:

            def work(seed: int, loaded: enginery.Engine = loaded) -> None:
                source = random.Random(seed)
                for _ in range(40):
                    params = SamplingParams(max_tokens=source.choice([1, 9, 60]), seed=seed, ignore_eos=True)
                    batch = [prompts(source) for _ in range(source.randint(1, 6))]
                    outputs = loaded.generate(batch, params)
                    assert all(len(output.outputs[0].token_ids) == params.max_tokens for output in outputs)

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(work, range(8)))
            stats = loaded.stats()
            assert stats["internal_error"] is None
            assert stats["finished"]["error"] == 0
            assert all(group["used_blocks"] == 0 for group in stats["groups"])
        free.append(cuda_gpu()["free_bytes"])
    assert free[1] - free[2] < GROWTH_BYTES
