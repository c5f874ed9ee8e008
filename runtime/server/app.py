"""The routes, and what stands before all of them: keys, request ids, limits, errors in one form."""

from __future__ import annotations

import hmac
import time
import uuid
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ... import __version__
from ..engine import Engine
from .chat import chat_completions
from .completions import completions
from .errors import ApiError, api_error
from .metrics import CONTENT_TYPE, render_metrics
from .protocol import Body, parse_body
from .state import ServerState
from .streaming import ClientGoneError

_OPEN_PATHS = ("/health", "/livez", "/readyz", "/metrics")
_LONGEST_REQUEST_ID = 128

Answer = Callable[[Request, Body, ServerState], Awaitable[Response]]


def create_app(
    served: Engine | ServerState, served_model_names: tuple[str, ...] = (), api_keys: tuple[str, ...] = ()
) -> ASGIApp:
    """The server as an ASGI application, over an engine or the state of one that is still loading."""
    if isinstance(served, ServerState):
        state = served
    else:
        state = ServerState(served_model_names=served_model_names, api_keys=api_keys)
        state.serve(served)
    routes = [
        Route("/v1/chat/completions", _post(chat_completions, state), methods=["POST"]),
        Route("/v1/completions", _post(completions, state), methods=["POST"]),
        Route("/v1/models", _get(_models, state)),
        Route("/v1/models/{name:path}", _get(_model, state)),
        Route("/health", _get(_health, state)),
        Route("/readyz", _get(_health, state)),
        Route("/livez", _get(_alive, state)),
        Route("/metrics", _get(_metrics, state)),
        Route("/version", _get(_version, state)),
    ]
    application = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})
    return Gate(application, state)


def _post(answer: Answer, state: ServerState) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(http: Request) -> Response:
        try:
            state.check()
            async with state.receives_body():
                data = await _read_body(http, state.largest_body_bytes)
            return await answer(http, parse_body(data), state)
        except (ClientGoneError, ClientDisconnect):
            return Response(status_code=499)  # nobody hears it; the access count does
        except Exception as error:
            return api_error(error).response()

    return endpoint


def _get(
    answer: Callable[[Request, ServerState], Response], state: ServerState
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(http: Request) -> Response:
        try:
            return answer(http, state)
        except Exception as error:
            return api_error(error).response()

    return endpoint


async def _read_body(http: Request, limit: int) -> bytes:
    kind, *parameters = http.headers.get("content-type", "application/json").lower().replace(" ", "").split(";")
    if charset := [value for value in parameters if value.startswith("charset=")]:
        name = charset[0].removeprefix("charset=").strip('"')
        if name not in ("utf-8", "utf8", "us-ascii"):
            raise ApiError(415, f"The body must be UTF-8, not {name[:100]!r}.", code="unsupported_media_type")
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"The body must be application/json, not {kind[:100]!r}.", code="unsupported_media_type")
    length = http.headers.get("content-length", "0")
    too_large = ApiError(413, f"The body is larger than {limit} bytes.", code="request_too_large")
    if length.isdigit() and int(length) > limit:
        raise too_large
    parts, size = [], 0
    async for part in http.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def _models(http: Request, state: ServerState) -> Response:
    state.check()
    return JSONResponse({"object": "list", "data": [state.describe_model(name) for name in state.served_model_names]})


def _model(http: Request, state: ServerState) -> Response:
    state.check()
    name = http.path_params["name"]
    return JSONResponse(state.describe_model(state.require_model(name))) if name else _models(http, state)


def _health(http: Request, state: ServerState) -> Response:
    """200 where a request could be served, else 503 that says why not."""
    elapsed = round(time.monotonic() - state.started, 3)
    try:
        state.check()
    except ApiError as error:
        body = {"status": state.phase, "elapsed_seconds": elapsed, **error.envelope()}
        return JSONResponse(body, 503, headers=error.headers)
    return JSONResponse({"status": "ready", "elapsed_seconds": elapsed})


def _alive(http: Request, state: ServerState) -> Response:
    return JSONResponse({"status": "alive"})


def _metrics(http: Request, state: ServerState) -> Response:
    return PlainTextResponse(render_metrics(state), media_type=CONTENT_TYPE)


def _version(http: Request, state: ServerState) -> Response:
    return JSONResponse({"version": __version__})


async def _http_error(http: Request, error: Exception) -> Response:
    """Starlette's own answers: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    messages = {
        404: f"There is nothing at {http.url.path[:200]}.",
        405: f"{http.method} is not for {http.url.path[:200]}.",
    }
    message = messages.get(error.status_code, str(error.detail))
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, message, headers=headers).response()


class Gate:
    """Lets requests in that may come in, names and counts them."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state = app, state
        self._keys = [key.encode() for key in state.api_keys]
        self._paths = (
            {route.path for route in app.routes if isinstance(route, Route)} if isinstance(app, Starlette) else set()
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        path, method = scope["path"], scope["method"]
        request_id = _request_id(headers.get(b"x-request-id"))
        state = self._state

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
                status = f"{message['status'] // 100}xx"
                state.http_requests[(self._handler(path), _known_method(method), status)] += 1
            await send(message)

        counts = path not in _OPEN_PATHS
        state.in_flight += counts
        try:
            if counts and self._keys and not self._has_key(headers):
                await _unauthorized().response()(scope, receive, send_named)
            else:
                await self._app(scope, receive, send_named)
        finally:
            state.in_flight -= counts

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        given = headers.get(b"x-api-key", b"")
        kind, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer":
            given = bearer.strip()
        # Every key is compared, each in constant time.
        return sum(hmac.compare_digest(given, key) for key in self._keys) > 0

    def _handler(self, path: str) -> str:
        """The route, so that clients cannot make up labels without end."""
        if path in self._paths:
            return path
        return "/v1/models/{name}" if path.startswith("/v1/models/") else "other"


def _known_method(method: str) -> str:
    return method if method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH") else "other"


def _unauthorized() -> ApiError:
    return ApiError(
        401,
        "A valid API key is needed: Authorization: Bearer KEY.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _request_id(given: bytes | None) -> bytes:
    if given and len(given) <= _LONGEST_REQUEST_ID and all(32 < byte < 127 for byte in given):
        return given
    return uuid.uuid4().hex.encode()
