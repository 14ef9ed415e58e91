"""Local copies of remote objects, named by their sha256: bounded in size, shared by the processes
of a machine. Standard library only.

RETROMILL_CACHE names the folder (default ~/.cache/retromill), RETROMILL_CACHE_BYTES its bound.
"""

import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CACHE_VARIABLE = "RETROMILL_CACHE"
CACHE_BYTES_VARIABLE = "RETROMILL_CACHE_BYTES"
DEFAULT_CACHE_BYTES = 256 << 30
_IN_USE_S = 600  # a copy that a process has just asked for is about to be opened
_ABANDONED_S = 24 * 3600
_SCRATCH = ".scratch-"


class CacheError(ValueError):
    """What is needed at once does not fit the bound."""


def cached_copy(sha256: str, num_bytes: int, download: Callable[[Path], None]) -> Path:
    """The copy of an object; `download` stores it under a path, or raises if it is not the object.
    Of processes that want the same one at once, one downloads it."""
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "retromill")
    cache.mkdir(parents=True, exist_ok=True)
    copy = cache / sha256
    if not _is_there(copy, num_bytes):
        with _turn(cache / f".lock-{sha256}"):
            if not _is_there(copy, num_bytes):
                _store(download, copy)
                _evict(cache)
    return copy


def cache_bound() -> int:
    """Bytes that the copies may take."""
    return int(os.environ.get(CACHE_BYTES_VARIABLE) or DEFAULT_CACHE_BYTES)


def require_room(num_bytes: int, what: str) -> None:
    """Raises CacheError when copies of that size, all of them needed at once, are beyond the
    bound."""
    if num_bytes > cache_bound():
        raise CacheError(
            f"{what}: local copies take {num_bytes} bytes, {CACHE_BYTES_VARIABLE} allows "
            f"{cache_bound()}; allow more, on a disk that has it ({CACHE_VARIABLE} names the "
            "folder), or take fewer shards"
        )


def _is_there(copy: Path, num_bytes: int) -> bool:
    """Whether the copy is there; if so it is marked as in use."""
    try:
        os.utime(copy)
        return copy.stat().st_size == num_bytes
    except FileNotFoundError:
        return False


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Waits until no other process is in the block for the same path."""
    with open(path, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _store(download: Callable[[Path], None], copy: Path) -> None:
    temporary = copy.parent / f"{_SCRATCH}{uuid.uuid4().hex}"
    try:
        download(temporary)
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)


def _evict(cache: Path) -> None:
    """Removes the least recently used copies beyond the bound, but none that was asked for within
    the last minutes; open memory maps of them stay valid. Removes old remains of killed downloads.
    """
    bound, now, copies = cache_bound(), time.time(), []
    for path in cache.iterdir():
        with suppress(FileNotFoundError):
            stat = path.stat()
            if len(path.name) == 64:
                copies.append((stat.st_mtime, stat.st_size, path))
            elif path.name.startswith(_SCRATCH) and now - stat.st_mtime > _ABANDONED_S:
                path.unlink()
    total = sum(size for _, size, _ in copies)
    for used, size, path in sorted(copies):
        if total <= bound or now - used < _IN_USE_S:
            return
        path.unlink(missing_ok=True)
        total -= size
