"""What stands before every route: keys, errors, limits, health, metrics, and clients that go away."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from enginery.runtime.server.state import ServerState
from enginery.runtime.tokenizer import Tokenizer

from ..conftest import null_engine
from .conftest import Served, serving, serving_engine

ENDLESS = {"prompt": "the", "ignore_eos": True, "temperature": 0}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return dict(error)


@pytest.mark.parametrize(
    "body", [b"", b"{", b'"text"', b"[]", b"3", b"null", b"\xff", b"[" * 100_000, b'{"temperature": NaN}', b"{'a': 1}"]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_body_that_is_no_object(served: Served, path: str, body: bytes) -> None:
    answer = served.http.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error_of(answer)


def test_wrong_content_type(served: Served) -> None:
    answer = served.http.post("/v1/completions", data={"prompt": "x"})
    assert answer.status_code == 415
    error_of(answer)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/responses", 404),
        ("GET", "/v1/completions", 405),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/nope", 404),
    ],
)
def test_paths_and_methods(served: Served, method: str, path: str, status: int) -> None:
    answer = served.http.request(method, path)
    assert answer.status_code == status
    error_of(answer)


def test_models_with_a_slash_are_the_list(served: Served) -> None:
    assert served.http.get("/v1/models/").json() == served.http.get("/v1/models").json()


def test_unknown_model(served: Served) -> None:
    for ask in (
        lambda: served.openai.completions.create(model="nope", prompt="x"),
        lambda: served.openai.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_models(served: Served) -> None:
    models = list(served.openai.models.list())
    assert [model.id for model in models] == ["tiny", "org/tiny"]
    assert all(model.created > 0 and model.max_model_len == 512 for model in models)  # type: ignore[attr-defined]
    assert served.openai.models.retrieve("org/tiny").id == "org/tiny"
    answer = served.openai.completions.create(model="org/tiny", prompt="x", max_tokens=1)
    assert answer.model == "org/tiny"


def test_request_ids(served: Served) -> None:
    assert served.http.get("/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert len(served.http.get("/health").headers["x-request-id"]) == 32
    assert len(served.http.get("/health", headers={"X-Request-Id": "x" * 500}).headers["x-request-id"]) == 32


def test_after_refusals_the_server_goes_on(served: Served) -> None:
    bodies: list[dict[str, Any]] = [{"prompt": []}, {"prompt": "x", "n": 0}, {"prompt": "x", "stream": 3}]
    for body in bodies:
        assert served.post("/v1/completions", body).status_code == 400
    assert served.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_errors_are_short_and_tell_nothing_of_us(served: Served) -> None:
    answer = served.post("/v1/completions", {"prompt": ["x" * 1000, {"y": "z" * 5000}]})
    message = error_of(answer)["message"]
    assert len(message) < 300
    assert "/work" not in message
    assert "0x" not in message


def test_keys(byte_level: Tokenizer) -> None:
    with serving_engine(null_engine(byte_level), api_keys=("one", "two")) as served:
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer three"}, 401),
            ({"Authorization": "one"}, 401),
            ({"Authorization": "Bearer one"}, 200),
            ({"Authorization": "bearer two"}, 200),
            ({"X-Api-Key": "two"}, 200),
        ):
            answer = served.http.get("/v1/models", headers=headers)
            assert answer.status_code == status
            assert status == 200 or error_of(answer)["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            served.openai.models.list()
        assert served.http.get("/v1/nothing").status_code == 401
        assert served.http.get("/health").status_code == served.http.get("/metrics").status_code == 200
        assert "one" not in served.http.get("/metrics").text.split()


def test_bodies_have_a_limit(byte_level: Tokenizer) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    with serving_engine(null_engine(byte_level), largest_body_bytes=len(body)) as served:
        headers = {"content-type": "application/json"}
        assert served.http.post("/v1/completions", content=body, headers=headers).status_code == 200
        for content in (body + b" ", iter([body, b" "])):
            answer = served.http.post("/v1/completions", content=content, headers=headers)
            assert answer.status_code == 413
            error_of(answer)


def test_before_and_after_serving(byte_level: Tokenizer) -> None:
    state = ServerState()
    with serving(state) as served:
        changes: list[tuple[str, Callable[[], None]]] = [
            ("loading", lambda: None),
            ("ready", lambda: state.serve(null_engine(byte_level))),
            ("draining", state.drain),
            ("failed", lambda: state.fail("chunk 3 is damaged")),
        ]
        for phase, change in changes:
            change()
            answer = served.http.get("/health")
            assert answer.json()["status"] == phase
            assert answer.status_code == (200 if phase == "ready" else 503)
            asked = served.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
            assert asked.status_code == (200 if phase == "ready" else 503)
            assert served.http.get("/livez").status_code == 200
            assert served.http.get("/metrics").status_code == 200
    assert state.engine is not None
    state.engine.close()


def test_damage_makes_health_fail(byte_level: Tokenizer) -> None:
    engine = null_engine(byte_level)
    with serving_engine(engine) as served:
        assert served.http.get("/health").status_code == 200
        engine._fail("weights: chunk 1 is damaged")
        answer = served.http.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "failed")
        assert served.post("/v1/completions", {"prompt": "x"}).status_code == 503


def test_a_failing_step_ends_a_stream_with_an_error(byte_level: Tokenizer) -> None:
    with serving_engine(null_engine(byte_level, spec={"isa": "fail_on=7"})) as served:
        body = {"prompt": [8], "max_tokens": 9, "logit_bias": {"7": 100}, "stream": True, "model": "tiny"}
        events = served.post("/v1/completions", body).text.strip().split("\n\n")
        assert set(json.loads(events[-1].removeprefix("data: "))) == {"error"}
        assert all('"finish_reason":null' in event for event in events[:-1])
        assert served.post("/v1/completions", {**body, "stream": False}).status_code == 500
        assert served.post("/v1/completions", {"prompt": [8], "logit_bias": {"7": -100}}).status_code == 200


async def leave(url: str, body: dict[str, Any], after_first_byte: bool) -> None:
    """Asks, and closes the connection."""
    address = httpx.URL(url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    writer.write(head.encode() + b"\r\n\r\n" + content)
    await writer.drain()
    if after_first_byte:
        await reader.readline()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_everything(byte_level: Tokenizer, stream: bool) -> None:
    engine = null_engine(byte_level, max_model_len=8000)
    with serving_engine(engine) as served:
        asyncio.run(leave(served.url, {**ENDLESS, "max_tokens": 7000, "stream": stream, "n": 2}, stream))
        # The pump's own condition, not time: what was aborted is counted.
        while engine.stats()["finished"]["abort"] < 2:
            assert engine.stats()["finished"]["length"] == 0
        assert engine.stats()["num_running"] == 0
        assert served.metric("request_success_total", finished_reason="abort") == 2
        assert served.post("/v1/completions", {**ENDLESS, "max_tokens": 3}).status_code == 200


def test_metrics_count(byte_level: Tokenizer) -> None:
    with serving_engine(null_engine(byte_level), served_model_names=("tiny",)) as served:
        for _ in range(3):
            served.post("/v1/completions", {**ENDLESS, "max_tokens": 5, "prompt": [1, 2, 3, 4]})
        served.post("/v1/completions", {"prompt": []})
        assert served.metric("request_success_total", finished_reason="length", model_name="tiny") == 3
        assert served.metric("prompt_tokens_total") == 12
        assert served.metric("generation_tokens_total") == 15
        assert served.metric("time_to_first_token_seconds_count") == 3
        assert served.metric("e2e_request_latency_seconds_count") == 3
        assert served.metric("inter_token_latency_seconds_count") == 12
        assert served.metric("num_requests_running") == served.metric("num_requests_waiting") == 0
        assert served.metric("kv_cache_usage_perc") == 0
        assert served.metric("http_requests_total", status="4xx", handler="/v1/completions") == 1
        assert served.metric("memory_bytes", kind="state") > 0
        assert served.http.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")


def test_many_clients_get_what_one_gets(byte_level: Tokenizer) -> None:
    engine = null_engine(byte_level, spec={"num_blocks": [40]})
    with serving_engine(engine) as served:
        wanted = served.post("/v1/completions", {**ENDLESS, "max_tokens": 40}).json()["choices"]

        def ask(stream: bool) -> str:
            answer = served.post("/v1/completions", {**ENDLESS, "max_tokens": 40, "stream": stream})
            if not stream:
                return str(answer.json()["choices"][0]["text"])
            events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
            return "".join(event["choices"][0]["text"] for event in events)

        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            texts = list(pool.map(ask, [index % 2 == 0 for index in range(32)]))
        assert set(texts) == {wanted[0]["text"]}
