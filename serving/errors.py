"""What can be wrong with a request or with the server, each kind with its HTTP status, and the one
form in which clients are told:

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

Details of faults of the server go to its log, never to a client.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Route

from model.generate_config import GenerationError

log = logging.getLogger(__name__)

INVALID = "invalid_request_error"
_PARSE_ERROR = "json_invalid"
_MOST_TOLD = 4


class ServingError(Exception):
    """An answer other than what was asked for.

    Attributes:
        message: For people.
        param: The field of the request that is at fault.
        code: For programs; by default the kind's.
        headers: Of the answer.
    """

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.headers = message, param, dict(headers or {})
        self.code = code or type(self).code

    @property
    def body(self) -> dict[str, Any]:
        """As clients see it."""
        return error_body(self.message, self.type, self.param, self.code)


class InvalidRequestError(ServingError):
    """A request that cannot be served as it is."""

    status, type, code = 422, INVALID, "invalid_value"


class UnauthorizedError(ServingError):
    """No token, or a wrong one."""

    status, type, code = 401, "authentication_error", "invalid_api_key"


class NotFoundError(ServingError):
    """Something that this server does not have."""

    status, type, code = 404, INVALID, "not_found"


class MisdirectedError(ServingError):
    """A request for another host."""

    status, type, code = 421, INVALID, "wrong_host"


class TooLargeError(ServingError):
    """More than the server takes."""

    status, type, code = 413, INVALID, "too_large"


class MediaTypeError(ServingError):
    """A body that is not JSON by its own account."""

    status, type, code = 415, INVALID, "unsupported_media_type"


class QueueFullError(ServingError):
    """Too many requests wait already."""

    status, type, code = 429, "rate_limit_error", "queue_full"


class ShuttingDownError(ServingError):
    """The server is being stopped."""

    status, code = 503, "shutting_down"


class RetrievalUnavailableError(ServingError):
    """A retrieval service failed."""

    status, code = 503, "retrieval_failed"


class StorageUnavailableError(ServingError):
    """Documents could not be saved."""

    status, code = 503, "storage_failed"


class RequestTimeoutError(ServingError):
    """It took longer than allowed."""

    status, code = 504, "timeout"


def error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def json_bytes(value: Any) -> bytes:
    """UTF-8 JSON of anything, strings that are no Unicode text included."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(json_bytes(value), status, headers, "application/json")


def error_response(error: ServingError) -> Response:
    return json_response(error.body, error.status, error.headers)


def as_serving_error(error: Exception) -> ServingError:
    """How clients are told of any error."""
    if isinstance(error, ServingError):
        return error
    if isinstance(error, GenerationError):
        return InvalidRequestError(str(error))
    log.error("a request failed", exc_info=error)
    return ServingError("the server failed; its log has the details")


class BodyTooLargeError(HTTPException):
    """Raised while a body is read, where FastAPI lets nothing but its own kind through."""

    def __init__(self, allowed: int) -> None:
        super().__init__(413, f"the body is above this server's max_body_bytes of {allowed}")


def install_handlers(app: FastAPI) -> None:
    """All errors of the app take the one form."""
    for kind in (ServingError, GenerationError, Exception):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_invalid)


def _answer(_: Request, error: Exception) -> Response:
    return error_response(as_serving_error(error))


def _answer_http(request: Request, error: Exception) -> Response:
    """Of a path or method that is not there, or a body that cannot be read."""
    assert isinstance(error, HTTPException)
    status, headers = error.status_code, dict(error.headers or {})
    if status == 405:
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    code = TooLargeError.code if status == 413 else HTTPStatus(status).name.lower()
    return json_response(error_body(str(error.detail), INVALID, None, code), status, headers)


def _methods(request: Request) -> set[str]:
    """That some route has for the path of a request."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    fitting = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return {method for route in fitting for method in route.methods or ()}


def _answer_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if found[0]["type"] == _PARSE_ERROR:
        reason = found[0].get("ctx", {}).get("error", "")
        return json_response(error_body(f"no JSON: {reason}", INVALID, None, _PARSE_ERROR), 400)
    told = [(_name(each["loc"]), each["msg"]) for each in found[:_MOST_TOLD]]
    message = "; ".join(f"{name}: {why}" if name else why for name, why in dict.fromkeys(told))
    return json_response(error_body(message, INVALID, told[0][0], found[0]["type"]), 422)


def _name(location: Sequence[Any]) -> str | None:
    """`prompt.0` of ("body", "prompt", "list[str]", 0): without the types that were tried."""
    parts = [str(part) for part in location[1:] if isinstance(part, int) or part.isidentifier()]
    return ".".join(parts) or None
