"""A file of any size on any fsspec URL, written in one go and there as a whole or not at all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from etl.deadline import RemoteError, within_deadline
from etl.storage import StorageError, filesystem_of, is_local, put_file, scratch_folder

_PART_BYTES = 64 << 20
_MAX_PARTS = 9000  # S3 allows 10,000


class Sink(Protocol):
    """What can be written to."""

    def write(self, data: bytes, /) -> object: ...


@contextmanager
def whole_file(url: str, num_bytes: int) -> Iterator[Sink]:
    """A file for `num_bytes` bytes, which is stored under `url` when the block ends without an
    error: by renaming if local, else by completing an upload in parts.

    Raises:
        StorageError: another number of bytes arrived.
        RemoteError: the storage failed; then nothing is there.
    """
    if is_local(url):
        with scratch_folder(url.rpartition("/")[0] or ".") as scratch:
            with open(scratch / "object", "wb") as file:
                yield file
            put_file(scratch / "object", url)
        return
    upload = _Upload(url, num_bytes)
    try:
        yield upload
    except BaseException:
        upload.discard()
        raise
    upload.commit()


class _Upload:
    """An upload in parts, each step within the deadline."""

    def __init__(self, url: str, num_bytes: int) -> None:
        self._url, self._num_bytes = url, num_bytes
        self._filesystem, self._path = filesystem_of(url)
        size = max(_PART_BYTES, -(-num_bytes // _MAX_PARTS))
        self._step_bytes = min(size, num_bytes)
        self._file: Any = self._filesystem.open(self._path, "wb", block_size=size, autocommit=False)

    def _bounded(self, step: Callable[[], object], num_bytes: int = 0) -> None:
        within_deadline(f"upload {self._url}", step, num_bytes)

    def write(self, data: bytes) -> None:
        self._bounded(lambda: self._file.write(data), self._step_bytes)

    def discard(self) -> None:
        with suppress(OSError):
            self._bounded(self._file.discard)

    def commit(self) -> None:
        """A failure to complete counts if the object is there: only the reply was lost."""
        self._bounded(self._file.close, self._step_bytes)
        with suppress(RemoteError, FileNotFoundError):
            self._bounded(self._file.commit)
        self._filesystem.invalidate_cache()
        exists = self._filesystem.exists(self._path)
        found = self._filesystem.size(self._path) if exists else 0
        if found != self._num_bytes:
            raise StorageError(
                f"{self._url}: {found} bytes arrived of {self._num_bytes}; run the job again"
            )
