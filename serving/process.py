"""A server process from first to last: the socket, the running application, and a stop by signal
that lets requests in progress end.
"""

import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from serving.engine import Engine

log = logging.getLogger(__name__)

_BACKLOG = 1024
_AFTER_GRACE_S = 10


class AddressError(ValueError):
    """An address on which a server cannot listen."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound but does not listen yet, so that a port in use is known before a model
    is loaded.

    Raises:
        AddressError: no such address on this machine, or in use.
    """
    if not 0 <= port < 1 << 16:
        raise AddressError(f"port is {port}; expected 0 to 65535, 0 for any that is free")
    try:
        [(family, kind, _, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise AddressError(
            f"cannot listen on host {host}, port {port}: {error}; name another, or port 0 for any "
            "that is free"
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Under which clients on this machine reach the socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    app: ASGIApp,
    engine: Engine,
    bound: socket.socket,
    announce: Callable[[], None],
    leave: Callable[[], None] | None = None,
) -> None:
    """Starts the engine, serves until SIGTERM or SIGINT, and ends what is in progress.

    Args:
        announce: Called once connections are accepted.
        leave: Called when no more are, to end those that would stay for good.
    """
    engine.start()
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=int(engine.limits.grace_s + _AFTER_GRACE_S),
    )
    try:
        _Server(config, engine, announce, leave).run([bound])
    finally:
        engine.close()


class _Server(uvicorn.Server):
    """Tells when it listens; a signal is an ordinary end."""

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Engine,
        announce: Callable[[], None],
        leave: Callable[[], None] | None,
    ) -> None:
        super().__init__(config)
        self._engine, self._announce, self._leave = engine, announce, leave

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._leave is not None:
            self._leave()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal stops gracefully, a second one at once."""
        log.info("%s: no more requests are taken", signal.Signals(sig).name)
        self._engine.refuse()
        self.force_exit = self.should_exit
        self.should_exit = True
