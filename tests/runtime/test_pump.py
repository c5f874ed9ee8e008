"""The pump: what comes out of the core reaches whoever asked, however threads fall."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from enginery.runtime.pump import Gathering, Pump
from enginery.runtime.requests import SamplingParams
from enginery.runtime.sequence import Delta, Sequence
from enginery.runtime.tokenizer import Tokenizer


class HastyCore:
    """Has finished a request, and the pump has looked for whose it is, before submit() is back."""

    def __init__(self) -> None:
        self._submitted, self.looked_up, self._closed = threading.Event(), threading.Event(), threading.Event()

    def submit(self, request: dict[str, Any]) -> int:
        self._submitted.set()
        self.looked_up.wait(0.2)  # only a pump that does not wait for submit() gets there
        return 7

    def wait(self, timeout_s: float) -> list[Any]:
        self._submitted.wait()
        if self._closed.is_set():
            return []
        self._closed.set()
        times = {"arrival_time": 0.0, "first_scheduled_time": 0.0, "first_token_time": 0.0}
        logprobs = {"logprobs": None, "prompt_logprobs": None, "stop_token_id": None, "num_cached_tokens": 0}
        return [
            SimpleNamespace(request_id=7, token_ids=[5], finish_reason="length", error=None, **logprobs, **times),
        ]

    def close(self) -> None:
        self._closed.set()
        self._submitted.set()


class WatchedTickets(dict[int, Any]):
    """Tells when somebody looks for a ticket."""

    def __init__(self, core: HastyCore) -> None:
        super().__init__()
        self._core = core

    def get(self, key: int, default: Any = None) -> Any:
        found = super().get(key, default)
        self._core.looked_up.set()
        return found


def test_an_answer_may_be_faster_than_submit(byte_level: Tokenizer) -> None:
    core = HastyCore()
    pump = Pump(core, lambda: None)  # type: ignore[arg-type]
    pump._tickets = WatchedTickets(core)
    deltas: list[Delta] = []
    sink = Gathering(1, deltas.append)
    pump.submit({}, Sequence(0, byte_level, [1], SamplingParams(), ()), sink)
    assert sink.done.wait(10)
    assert [delta.token_ids for delta in deltas] == [[5]]
    pump.close()
