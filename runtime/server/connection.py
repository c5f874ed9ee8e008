"""A client's connection: uvicorn's, with refusals in OpenAI's form, a limit for heads, and HTTP/1.0 as it was meant."""

from __future__ import annotations

import json
import sys
from typing import Any

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from .errors import ApiError

LARGEST_HEAD_BYTES = 64 << 10
LINGER_S = 1.0
_STATUS_LINES = {400: b"HTTP/1.1 400 Bad Request\r\n", 431: b"HTTP/1.1 431 Request Header Fields Too Large\r\n"}


class Connection(HttpToolsProtocol):
    """One connection; the parser calls the methods on_…."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.app = EndsWithConnection(self.app)
        self._in_head = self._in_message = self._refused = False
        self._heads_begun = 0
        self._head_bytes = 0  # of the headers that are there
        self._arrived_bytes = 0  # since the head began that is not yet there

    def data_received(self, data: bytes) -> None:
        """Takes what has come."""
        if self._refused:
            return
        self._unset_keepalive_if_required()
        heads_begun, began_between = self._heads_begun, not self._in_message
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("")
        # The parser tells of a header when all of it is there, which may be never.
        if self._in_head and heads_begun + began_between == self._heads_begun and not self._refused:
            self._arrived_bytes += len(data)
            if self._arrived_bytes > LARGEST_HEAD_BYTES:
                self.send_400_response("")

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._in_head = self._in_message = True
        self._heads_begun += 1
        self._head_bytes = self._arrived_bytes = 0

    def on_url(self, url: bytes) -> None:
        """The path, or a part of it."""
        super().on_url(url)
        self._count(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        super().on_header(name, value)
        self._count(name + value)

    def on_headers_complete(self) -> None:
        """The head ends."""
        self._in_head = False
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A request is there, or the head of one that asks for another protocol."""
        self._in_message = False
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _decline_upgrade(self, rest: bytes) -> None:
        """Goes on in HTTP/1.1 with a client that would rather speak another protocol, as Java's do by default."""
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self.send_400_response("")
            return
        # The parser took what follows for the other protocol: it begins again, with a head that asks for none.
        headers = [(name, value) for name, value in self.headers if name not in (b"upgrade", b"connection")]
        lines = [b"%s %s HTTP/%s" % (method, self.url, version), *(b"%s: %s" % header for header in headers)]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([*lines, b"", b""]) + rest)

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP, or too much of it, and closes."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.close()
                return
        self.transport.write(_refusal(max(self._head_bytes, self._arrived_bytes) > LARGEST_HEAD_BYTES))
        # To close while the client still sends would take the answer from it.
        self._refused = True
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _count(self, data: bytes) -> None:
        self._head_bytes += len(data)
        if self._head_bytes > LARGEST_HEAD_BYTES:
            raise ValueError("The head is too long.")  # the parser passes it on as an error of its own


class EndsWithConnection:
    """For clients of HTTP/1.0, who know no chunks: a body whose length is not told ends where the connection does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = getattr(send, "__self__", None)
        if scope["type"] != "http" or scope["http_version"] != "1.0" or not isinstance(cycle, RequestResponseCycle):
            await self._app(scope, receive, send)
            return
        has_length = True

        async def send_plainly(message: Message) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                has_length = any(name.lower() == b"content-length" for name, _ in message["headers"])
                if not has_length:
                    cycle.chunked_encoding, cycle.expected_content_length = False, sys.maxsize
            elif not has_length and not message.get("more_body"):
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await self._app(scope, receive, send_plainly)


def _refusal(too_long: bool) -> bytes:
    if too_long:
        error = ApiError(431, f"The request's head is longer than {LARGEST_HEAD_BYTES} bytes.", code="head_too_large")
    else:
        error = ApiError(400, "The request is not valid HTTP.", code="invalid_http")
    body = json.dumps(error.envelope()).encode()
    head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
    return _STATUS_LINES[error.status] + head + body
