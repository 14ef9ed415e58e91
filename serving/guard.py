"""What stands before all routes: tokens, the host that was asked for, the size of a body, and the
count of answers. Plain ASGI, so that streams pass through unbuffered.
"""

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import (
    BodyTooLargeError,
    MediaTypeError,
    MisdirectedError,
    ServingError,
    TooLargeError,
    UnauthorizedError,
    error_response,
)
from serving.measures import Measures
from serving.security import Credentials, is_loopback

HEALTH = "/healthz"
MANIFEST, FAVICON = "/manifest.json", "/favicon.ico"


def require_json(request: Request) -> None:
    """A dependency of routes with a body. Pages of other sites cannot send this type unasked.

    Raises:
        MediaTypeError: the body is something else.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise MediaTypeError(
            f"the body's Content-Type is {kind or 'missing'}; expected application/json"
        )


class Guard:
    """Lets a request through if it has a token; if the server has none, which it may on this
    machine only, if it asks for this machine by name (so that no other site's name that points here
    reaches it from a browser).

    Args:
        page_path: Where the page is; it has a login of its own. Browsers ask for its manifest and
            icon at the root.
    """

    def __init__(self, app: ASGIApp, credentials: Credentials, page_path: str | None) -> None:
        self._app, self._credentials = app, credentials
        self._page_path = page_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        error = self._error(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error_response(error)(scope, receive, send)

    def _error(self, scope: Scope) -> ServingError | None:
        headers, path = Headers(scope=scope), scope["path"]
        if not self._credentials.tokens:
            host = headers.get("host", "")
            if is_loopback(_without_port(host)):
                return None
            return MisdirectedError(f"this server is not {host!r}; ask for 127.0.0.1 or localhost")
        if path == HEALTH or self._is_page(path):
            return None
        if self._credentials.admits(headers.get("authorization", "")):
            return None
        return UnauthorizedError(
            "expected the header Authorization: Bearer TOKEN with one of this server's tokens",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _is_page(self, path: str) -> bool:
        return self._page_path is not None and (
            path in (self._page_path, MANIFEST, FAVICON) or path.startswith(f"{self._page_path}/")
        )


class BodyLimit:
    """Stops reading a body that is too large."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app, self._most = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = Headers(scope=scope).get("content-length", "0")
        if not told.isdecimal() or int(told[:20]) > self._most:
            error = TooLargeError(
                f"the body is above this server's max_body_bytes of {self._most}",
                headers={"Connection": "close"},
            )
            await error_response(error)(scope, receive, send)
            return
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise BodyTooLargeError(self._most)
            return message

        await self._app(scope, limited, send)


class AnswerCount:
    """Counts answers by route and status."""

    def __init__(self, app: ASGIApp, measures: Measures) -> None:
        self._app, self._measures = app, measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._measures.requests.labels(route, str(status)).inc()


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
