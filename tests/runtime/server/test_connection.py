"""What comes over a socket, byte by byte: bad framing, old and unusual clients, bodies that are no JSON of ours."""

from __future__ import annotations

import json
import socket
import threading
from http.client import HTTPResponse
from typing import Any

import httpx
import pytest
from enginery.runtime.server.connection import LARGEST_HEAD_BYTES
from enginery.runtime.tokenizer import Tokenizer

from ..conftest import null_engine
from .conftest import Served, serving_engine

BODY = json.dumps({"prompt": "the", "max_tokens": 3, "temperature": 0}).encode()
STREAM = json.dumps({"prompt": "the", "max_tokens": 3, "temperature": 0, "stream": True}).encode()
HEAD = "Host: x\r\nContent-Type: application/json\r\n"


def connect(served: Served) -> socket.socket:
    url = httpx.URL(served.url)
    return socket.create_connection((url.host, url.port or 80), timeout=30)


def post(body: bytes, *headers: str, version: str = "1.1") -> bytes:
    lines = "".join(f"{header}\r\n" for header in headers)
    head = f"POST /v1/completions HTTP/{version}\r\n{HEAD}{lines}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def answer(client: socket.socket) -> tuple[HTTPResponse, Any]:
    """The next response and its JSON."""
    response = HTTPResponse(client)
    response.begin()
    return response, json.loads(response.read())


def read_all(client: socket.socket) -> bytes:
    data = b""
    while part := client.recv(1 << 16):
        data += part
    return data


@pytest.mark.parametrize(
    "data",
    [
        "nonsense\r\n\r\n",
        "GET /health HTTP/1.1\r\nno header\r\n\r\n",
        "GET /é HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
        "CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        f"POST /v1/completions HTTP/1.1\r\n{HEAD}Content-Length: -5\r\n\r\n{{}}",
        f"POST /v1/completions HTTP/1.1\r\n{HEAD}Content-Length: many\r\n\r\n{{}}",
        f"POST /v1/completions HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        f"POST /v1/completions HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\n5\r\n12345XX",
        f"POST /v1/completions HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_in_the_usual_form(served: Served, data: str) -> None:
    with connect(served) as client:
        client.sendall(data.encode())
        response, document = answer(client)
        assert response.status == 400
        assert document["error"]["code"] == "invalid_http"
        assert set(document["error"]) == {"message", "type", "param", "code"}
        assert client.recv(1) == b""


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
@pytest.mark.parametrize(
    "begin", [b"GET /health HTTP/1.1\r\nX: ", b"GET /", b"GET / HTTP/1.1\r\n" + b"X: 0\r\n" * 9 + b"X:"]
)
def test_a_head_without_end(served: Served, begin: bytes, end: bytes) -> None:
    with connect(served) as client:
        client.sendall(begin)
        for _ in range(5):
            client.sendall(b"a" * (LARGEST_HEAD_BYTES // 4))
        client.sendall(end)
        response, document = answer(client)
        assert response.status == 431
        assert document["error"]["code"] == "head_too_large"


def test_a_head_of_many_headers(served: Served) -> None:
    with connect(served) as client:
        client.sendall(b"GET /health HTTP/1.1\r\n" + b"X: 0123456789\r\n" * (LARGEST_HEAD_BYTES // 10) + b"\r\n")
        assert answer(client)[0].status == 431
    with connect(served) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nX: " + b"a" * (LARGEST_HEAD_BYTES // 2) + b"\r\n\r\n")
        assert answer(client)[0].status == 200


def test_a_body_that_is_announced_too_large_is_not_read(served: Served) -> None:
    with connect(served) as client:
        client.sendall(f"POST /v1/completions HTTP/1.1\r\n{HEAD}Content-Length: 99999999999\r\n\r\n".encode())
        response, document = answer(client)
        assert response.status == 413
        assert document["error"]["code"] == "request_too_large"


def test_http_1_0(served: Served) -> None:
    with connect(served) as client:
        client.sendall(post(STREAM, version="1.0"))
        head, _, body = read_all(client).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        assert b"connection: close" in head.lower()
        assert all(event.startswith(b"data: ") for event in body.rstrip().split(b"\n\n"))
        assert body.endswith(b"data: [DONE]\n\n")
    with connect(served) as client:
        client.sendall(post(BODY, version="1.0"))
        assert answer(client)[1]["usage"]["completion_tokens"] == 3
        assert client.recv(1) == b""


@pytest.mark.parametrize("split", [0, 30, 200])
def test_a_client_that_would_rather_speak_another_protocol(served: Served, split: int) -> None:
    asks = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAA")
    with connect(served) as client:
        for _ in range(2):  # and once more on the same connection
            data = post(BODY, *asks)
            client.sendall(data[:split])
            client.sendall(data[split:])
            response, document = answer(client)
            assert response.status == 200
            assert document["usage"]["completion_tokens"] == 3


def test_a_connection_goes_on_after_refusals(served: Served) -> None:
    with connect(served) as client:
        for body, status in ((b"{", 400), (BODY, 200), (b"[]", 400), (b"", 400), (BODY, 200)):
            client.sendall(post(body))
            assert answer(client)[0].status == status
        client.sendall(post(BODY) * 3)
        assert read_responses(client, 3) == [200, 200, 200]


def read_responses(client: socket.socket, count: int) -> list[int]:
    """The statuses of responses that may come in one piece."""
    with client.makefile("rb") as stream:
        statuses = []
        for _ in range(count):
            statuses.append(int(stream.readline().split()[1]))
            length = 0
            while (line := stream.readline()) != b"\r\n":
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            stream.read(length)
        return statuses


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"\xef\xbb\xbf" + BODY, "BOM"),
        (BODY.decode().encode("utf-16"), "not UTF-8"),
        (b'{"prompt": "\xe9"}', "not UTF-8, at byte 12"),
        (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"prompt": "a", "max_tokens": 1, "prompt": "b"}', "'prompt' is there twice"),
        (b'{"prompt": "a", "metadata": {"x": 1, "x": 1}}', "'x' is there twice"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 500 + b"}", "max_tokens must be"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature must be"),
        (b'{"prompt": "a", "temperature": Infinity}', "no JSON number"),
        (b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deeply"),
        (b'{"prompt": "a", "stop": ["\\ud800"]}', "half a surrogate pair"),
        (b'{"prompt": "a", "stop": "\\ud800"}', "half a surrogate pair"),
        (b'{"prompt": "a", "cache_salt": "\\ud800"}', "half a surrogate pair"),
        (BODY + b"x", "Extra data"),
    ],
)
def test_bodies_that_are_no_json_of_ours(served: Served, body: bytes, says: str) -> None:
    response = served.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]
    assert "sys." not in response.text


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json; charset=UTF-8", 200),
        ('application/json;charset="utf-8"', 200),
        ("application/json; charset=utf-16", 415),
        ("application/json; charset=latin-1", 415),
    ],
)
def test_charsets(served: Served, kind: str, status: int) -> None:
    assert served.http.post("/v1/completions", content=BODY, headers={"content-type": kind}).status_code == status


def test_a_body_that_is_half_sent_when_draining_begins(byte_level: Tokenizer) -> None:
    with serving_engine(null_engine(byte_level)) as served, connect(served) as client:
        client.sendall(post(BODY, "Expect: 100-continue")[:-5])
        assert client.recv(100).startswith(b"HTTP/1.1 100")
        while not served.state.receiving:
            pass
        loop = next(iter(served.state.receiving))._task.get_loop()  # type: ignore[attr-defined]
        drained = threading.Event()
        loop.call_soon_threadsafe(lambda: (served.state.drain(), drained.set()))
        drained.wait()
        response, document = answer(client)
        assert response.status == 503
        assert document["error"]["code"] == "draining"
        assert response.getheader("connection") == "close"
        assert client.recv(1) == b""
        assert served.state.in_flight == 0
