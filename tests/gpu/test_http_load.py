"""The client and the server's process that soak and benchmark use, with an engine for this machine's CPU."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ..runtime.conftest import built_engine
from .http_load import complete, serving

__all__ = ["built_engine"]


def test_counts_tokens_and_times(built_engine: Path) -> None:
    with serving(built_engine, "--max-num-seqs", "4") as server:

        async def load() -> None:
            first, second, cut = await asyncio.gather(
                complete(server, [5, 6, 7], max_tokens=12),
                complete(server, [9], max_tokens=3),
                complete(server, [8, 4], hang_up_after=2, max_tokens=200),
            )
            assert (first.status, first.num_tokens, second.num_tokens) == (200, 12, 3)
            assert 1 <= len(first.events) <= 12
            assert first.began < first.events[0]
            assert len(cut.events) == 2
            refused = await complete(server, [10**6], max_tokens=1)
            assert (refused.status, refused.events) == (400, [])
            while server.metrics()["num_requests_running"]:
                await asyncio.sleep(0)

        asyncio.run(load())
        metrics = server.metrics()
        assert metrics["kv_cache_usage_perc"] == 0
        assert metrics["generation_tokens_total"] >= 15


def test_tells_why_there_is_no_server(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="run-engine ended: "), serving(tmp_path / "nothing"):
        pass
