"""Work for a client that ends when the client leaves."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

from serving.errors import ServingError

Result = TypeVar("Result")


class ClientLeftError(ServingError):
    """Nobody reads this answer; it is counted only."""

    status, type, code = 499, "client_error", "client_left"


async def unless_client_leaves(request: Request, work: Awaitable[Result]) -> Result:
    """The result of the work, which is cancelled when the connection is closed. The request's body
    must have been read.

    Raises:
        ClientLeftError: it was closed.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_closed(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeftError("the client closed the connection")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _closed(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
