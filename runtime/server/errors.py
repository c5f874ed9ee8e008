"""Errors as OpenAI's clients expect them: a status and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
from typing import Any

from starlette.responses import Response

from ...engines.errors import CapacityError, EngineryError, RequestError
from ..requests import InvalidField, PromptTooLong

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    503: "service_unavailable",
}
_LONGEST_MESSAGE = 2000
log = logging.getLogger("enginery.server")


class ApiError(Exception):
    """An answer other than success. param: the request's field; code: what clients switch on."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def envelope(self) -> dict[str, Any]:
        """The body of the answer."""
        message = str(self)
        if len(message) > _LONGEST_MESSAGE:
            message = message[: _LONGEST_MESSAGE - 3] + "..."
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer."""
        body = json.dumps(self.envelope()).encode()
        return Response(body, self.status, headers=self.headers, media_type="application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be."""
    return ApiError(400, message, param=param, code=code)


def api_error(error: Exception) -> ApiError:
    """What a client is told of an exception; nothing of our insides."""
    match error:
        case ApiError():
            return error
        case InvalidField():
            return invalid(str(error), error.param, "invalid_value")
        case PromptTooLong():
            return invalid(str(error), None, "context_length_exceeded")
        case RequestError() | CapacityError():
            return invalid(str(error))
        case EngineryError():
            log.error("%s", error)
            return ApiError(500, "The engine failed. The server's log says why.", code="engine_error")
        case _:
            log.error("A request failed.", exc_info=error)
            return ApiError(500, "Internal error. The server's log says more.", code="internal_error")
