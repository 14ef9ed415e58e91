"""Deadlines for remote storage: a silent server ends an operation with an error, never a job that
hangs.

RETROMILL_STORAGE_DEADLINE_S (default 300) bounds one operation; a large upload or download gets a
second more for each MiB. Local files are used directly.
"""

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

DEADLINE_VARIABLE = "RETROMILL_STORAGE_DEADLINE_S"
DEFAULT_DEADLINE_S = 300.0
_BYTES_PER_S = 1 << 20
_INSTANT = {"unstrip_protocol", "invalidate_cache"}
T = TypeVar("T")


class RemoteError(OSError):
    """Remote storage failed, after the client's own retries."""


class DeadlineError(RemoteError):
    """Storage did not answer in time."""


def within_deadline(what: str, work: Callable[[], T], num_bytes: int = 0) -> T:
    """work()'s result; it runs in a thread of its own, which is left behind when time is up.

    Raises:
        DeadlineError: it did not end in time.
        RemoteError: it failed with an exception of the client library's own.
    """
    limit = float(os.environ.get(DEADLINE_VARIABLE) or DEFAULT_DEADLINE_S)
    limit += num_bytes / _BYTES_PER_S
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = work()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        raise DeadlineError(
            f"{what}: no answer within {limit:.0f} s; check the storage endpoint, or allow more "
            f"with {DEADLINE_VARIABLE}"
        )
    error = outcome.get("error")
    if isinstance(error, Exception) and not isinstance(error, (OSError, ValueError, TypeError)):
        raise RemoteError(f"{what}: {type(error).__name__}: {error}") from error
    if error is not None:
        raise error
    return outcome["value"]


class BoundedFileSystem:
    """A remote fsspec filesystem whose every call ends within the deadline."""

    def __init__(self, filesystem: Any) -> None:
        self.__dict__["_filesystem"] = filesystem

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_filesystem"], name)
        if not callable(value) or name in _INSTANT:
            return value

        def bounded(*args: Any, **kwargs: Any) -> Any:
            what = f"{name} {args[name == 'put_file'] if args else ''}"
            return within_deadline(what, lambda: value(*args, **kwargs), self._size_of(name, args))

        return bounded

    def _size_of(self, name: str, args: tuple[Any, ...]) -> int:
        if name == "put_file":
            return os.path.getsize(args[0])
        return self.size(args[0]) if name == "get_file" else 0
