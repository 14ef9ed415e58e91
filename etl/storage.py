"""Objects on any fsspec URL: atomic writes, create-only records, checksummed local copies.

Every stage of the data path keeps its output in a `StageFolder`. Object stores have no rename, so a
file is first written to local scratch, then stored under a name that contains its own hash (two
attempts that differ never collide, two that agree are the same object), and only then announced by
a small create-only record. Readers trust records.

fsspec and the standard library only.
"""

import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from etl.cache import cached_copy
from etl.deadline import BoundedFileSystem, DeadlineError, RemoteError

log = logging.getLogger(__name__)

_READ_ATTEMPTS = 4
_RANGE_BYTES = 8 << 20
_SCRATCH = ".scratch-"
_REQUESTS = 16


class StorageError(ValueError):
    """An object is missing, damaged, or not what its record says."""


@dataclass(frozen=True)
class StoredFile:
    """One immutable object in a stage folder: its name there, its size in bytes and its sha256
    (hex)."""

    name: str
    bytes: int
    sha256: str


def join_url(url: str, *names: str) -> str:
    """`url/name/...` with exactly one slash between the parts."""
    return "/".join([url.rstrip("/"), *(name.strip("/") for name in names)])


def filesystem_of(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem behind `url`, with deadlines if it is remote, and the path inside it."""
    filesystem, path = url_to_fs(url)
    if isinstance(filesystem, LocalFileSystem):
        return filesystem, path
    return cast(fsspec.AbstractFileSystem, BoundedFileSystem(filesystem)), path


def is_local(url: str) -> bool:
    return isinstance(filesystem_of(url)[0], LocalFileSystem)


def content_key(*parts: Any) -> str:
    """32 hex digits that change whenever any of the JSON-serialisable `parts` changes."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} cannot be part of a content key")


def sha256_of(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(url: str) -> bytes:
    """The object's bytes.

    Raises:
        FileNotFoundError: there is no such object.
    """
    filesystem, path = filesystem_of(url)
    return bytes(cast(Any, filesystem.cat_file(path)))


def read_json(url: str) -> Any:
    """The object's JSON value.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: it is not JSON.
    """
    try:
        return json.loads(read_bytes(url))
    except ValueError as error:
        raise StorageError(
            f"{url}: expected JSON, found {error}; delete it and run the job that wrote it"
        ) from None


def write_json(url: str, value: Any) -> None:
    """Replaces the object with `value` as JSON; a reader sees the old value or the new one, never a
    part."""
    data = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
    write_atomically(url, lambda file: file.write(data))


def write_atomically(url: str, write: Callable[[BinaryIO], object]) -> None:
    """Stores what `write(file)` writes under `url`, all of it or nothing."""
    with scratch_folder(url.rstrip("/").rpartition("/")[0] or ".") as scratch:
        local = scratch / "object"
        with open(local, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        put_file(local, url)


def put_file(local: Path, url: str) -> None:
    """Moves (local destination) or uploads a finished file.

    Raises:
        StorageError: what arrived has another size.
    """
    filesystem, path = filesystem_of(url)
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.put_file(str(local), path)
        filesystem.invalidate_cache()
        if filesystem.size(path) != local.stat().st_size:
            raise StorageError(
                f"{url}: {filesystem.size(path)} bytes arrived of {local.stat().st_size}; run the "
                "job again"
            )
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    os.replace(local, path)
    _sync_folder(os.path.dirname(path))


def _sync_folder(path: str) -> None:
    descriptor = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_json(url: str, value: Any) -> bool:
    """Publishes `value` under `url` unless something is there already; True if this call published
    it."""
    data = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
    filesystem, path = filesystem_of(url)
    try:
        if isinstance(filesystem, LocalFileSystem):
            _create_local(path, data)
        else:
            filesystem.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True


def _create_local(path: str, data: bytes) -> None:
    with scratch_folder(os.path.dirname(path)) as scratch:
        temporary = scratch / "object"
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    _sync_folder(os.path.dirname(path))


class RangeReader(io.RawIOBase):
    """An object's bytes by range requests: seekable, each request within the deadline, and a
    response of another length than asked for is an error.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: while reading, if responses stay incomplete.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._filesystem, self._path = filesystem_of(url)
        self._filesystem.invalidate_cache()
        self._bytes: int = self._filesystem.info(self._path)["size"]
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {0: 0, 1: self._position, 2: self._bytes}[whence]
        return self._position

    def readall(self) -> bytes:
        parts = []
        while self._position < self._bytes:
            stop = min(self._position + _RANGE_BYTES, self._bytes)
            parts.append(self.read_range(self._position, stop))
            self._position = stop
        return b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._bytes)
        if stop <= self._position:
            return 0
        data = self.read_range(self._position, stop)
        buffer[: len(data)] = data
        self._position = stop
        return len(data)

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes start .. stop - 1, asked for again with longer and longer pauses if they come
        incomplete; from any thread."""
        found = 0
        for attempt in range(_READ_ATTEMPTS):
            time.sleep(attempt)
            try:
                found_bytes = self._filesystem.cat_file(self._path, start=start, end=stop)
            except (DeadlineError, FileNotFoundError, PermissionError):
                raise
            except OSError:
                if attempt == _READ_ATTEMPTS - 1:
                    raise
                continue
            data = bytes(cast(Any, found_bytes))
            if len(data) == stop - start:
                return data
            found = len(data)
        raise StorageError(
            f"{self._url}: asked for bytes {start}..{stop}, {found} came, {_READ_ATTEMPTS} times; "
            "the object was changed or the storage is failing"
        )


@contextmanager
def scratch_folder(url: str) -> Iterator[Path]:
    """A local folder to write in before storing under `url`; on the same disk when `url` is local.
    Removed at exit, and locked until then: it can be told from what a killed writer left."""
    filesystem, path = filesystem_of(url)
    if isinstance(filesystem, LocalFileSystem):
        scratch = Path(path) / f"{_SCRATCH}{uuid.uuid4().hex}"
        scratch.mkdir(parents=True)
    else:
        scratch = Path(tempfile.mkdtemp(prefix="retromill-"))
    lock = os.open(scratch, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield scratch
    finally:
        os.close(lock)
        shutil.rmtree(scratch, ignore_errors=True)


def _is_held(scratch: str) -> bool:
    """Whether the process that made this scratch folder lives (on a file system with locks)."""
    try:
        descriptor = os.open(scratch, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


@dataclass(frozen=True)
class StageFolder:
    """The output of one stage: immutable files and the records that announce them.

    `url` ends in a hash of everything that determines the content, so a changed configuration is
    another folder and a finished one is never overwritten.
    """

    url: str

    def path_of(self, name: str) -> str:
        return join_url(self.url, name)

    def store(self, stem: str, *local: Path) -> list[StoredFile]:
        """Moves (local destination) or uploads finished files as `stem-<hash of them all><suffixes
        of each>`."""
        digests = [sha256_of(path) for path in local]
        key = content_key(digests)[:16]
        stored = []
        for path, digest in zip(local, digests, strict=True):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            name = f"{stem}-{key}{''.join(path.suffixes)}"
            stored.append(StoredFile(name, path.stat().st_size, digest))
            self._put(path, stored[-1])
        return stored

    def _put(self, path: Path, file: StoredFile) -> None:
        """Stores the file; a failed upload counts if the object is there: only its reply was
        lost."""
        try:
            put_file(path, self.path_of(file.name))
        except RemoteError as error:
            with suppress(StorageError):
                self.check_size(file)
                log.info("%s arrived, though: %s", file.name, error)
                return
            raise

    def publish(self, record: str, value: dict[str, Any]) -> dict[str, Any]:
        """Create-only: the record that is in force afterwards, this one or an earlier attempt's."""
        url = self.path_of(f"{record}.json")
        create_json(url, value)
        return read_json(url)

    def record(self, record: str) -> dict[str, Any] | None:
        """The record, or None when it is absent or names a file that is missing or of another size.

        A record that cannot be trusted is removed, so that the work it stood for is done again.
        """
        return self._trusted(record, self.check_size)

    def records(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Those of the records that are there and can be trusted, as `record` does, but with one
        listing of the folder and many requests at a time."""
        filesystem, path = filesystem_of(self.url)
        filesystem.invalidate_cache()
        root = path.rstrip("/") + "/"
        listing = cast(dict[str, Any], filesystem.find(path, detail=True))
        sizes = {name.removeprefix(root): entry["size"] for name, entry in listing.items()}
        present = [name for name in names if f"{name}.json" in sizes]

        def check(file: StoredFile) -> None:
            if sizes.get(file.name) != file.bytes:
                self.check_size(file)

        with ThreadPoolExecutor(_REQUESTS) as pool:
            values = pool.map(lambda name: self._trusted(name, check), present)
            return {name: value for name, value in zip(present, values, strict=True) if value}

    def all_records(self, names: Sequence[str], remedy: str) -> list[dict[str, Any]]:
        """All of the records, in order.

        Raises:
            StorageError: some are missing, or were removed as not to be trusted; ends with
                `remedy`.
        """
        found = self.records(names)
        missing = [name for name in names if name not in found]
        if missing:
            raise StorageError(
                f"{self.url}: {len(missing)} of {len(names)} records are missing: "
                f"{', '.join(missing[:5])}; {remedy}"
            )
        return [found[name] for name in names]

    def _trusted(self, record: str, check: Callable[[StoredFile], None]) -> dict[str, Any] | None:
        url = self.path_of(f"{record}.json")
        try:
            value = read_json(url)
            for entry in value.get("files", {}).values():
                check(StoredFile(**entry))
        except FileNotFoundError:
            return None
        except StorageError as error:
            log.warning("redoing %s: %s", record, error)
            filesystem, path = filesystem_of(url)
            with suppress(FileNotFoundError):
                filesystem.rm_file(path)
            return None
        return value

    def check_size(self, file: StoredFile) -> None:
        """Raises StorageError unless the file is there with the recorded size."""
        url = self.path_of(file.name)
        filesystem, path = filesystem_of(url)
        filesystem.invalidate_cache()
        try:
            found = filesystem.size(path)
        except FileNotFoundError:
            raise StorageError(f"{url}: missing, its record says {file.bytes} bytes") from None
        if found != file.bytes:
            raise StorageError(f"{url}: {found} bytes, its record says {file.bytes}")

    def fetch(self, file: StoredFile) -> Path:
        """A local path with the file's content: the file itself if local, else a checksummed copy
        in the cache.

        Raises:
            StorageError: missing, of another size, or (a copy) of another sha256 than recorded.
        """
        filesystem, path = filesystem_of(self.path_of(file.name))
        if isinstance(filesystem, LocalFileSystem):
            self.check_size(file)
            return Path(path)
        download = partial(_download, filesystem, path, file)
        return cached_copy(file.sha256, file.bytes, download)

    def fetch_verified(self, file: StoredFile) -> Path:
        """As `fetch`, with the sha256 of a local file checked too: for files whose damage their own
        format does not show.

        Raises:
            StorageError: missing, of another size, or of another sha256 than recorded.
        """
        path = self.fetch(file)
        if is_local(self.url) and (found := sha256_of(path)) != file.sha256:
            raise StorageError(
                f"{path}: sha256 {found}, its record says {file.sha256}; the file is damaged: "
                "delete it and run the job that wrote it again"
            )
        return path

    def remove_scratch(self) -> None:
        """Deletes what killed writers left in a local folder; what a living one holds stays. Call
        it once the stage is complete."""
        if not is_local(self.url):
            return
        for folder, folders, files in os.walk(filesystem_of(self.url)[1]):
            for name in [name for name in (*folders, *files) if name.startswith(_SCRATCH)]:
                leftover = os.path.join(folder, name)
                if _is_held(leftover):
                    continue
                shutil.rmtree(leftover, ignore_errors=True)
                with suppress(OSError):
                    os.unlink(leftover)

    def remove_unnamed(self, named: set[str]) -> int:
        """Deletes every object of the folder whose name is not in `named`: what attempts left
        behind that nothing refers to. Returns how many. Call it once the stage is complete."""
        self.remove_scratch()
        filesystem, path = filesystem_of(self.url)
        filesystem.invalidate_cache()
        root = path.rstrip("/") + "/"
        names = [entry.removeprefix(root) for entry in filesystem.find(path)]
        unnamed = [name for name in names if name not in named and f"/{_SCRATCH}" not in f"/{name}"]
        for name in unnamed:
            with suppress(FileNotFoundError):
                filesystem.rm_file(root + name)
        return len(unnamed)


def _download(
    filesystem: fsspec.AbstractFileSystem, path: str, file: StoredFile, local: Path
) -> None:
    filesystem.get_file(path, str(local))
    found = sha256_of(local)
    if found != file.sha256:
        raise StorageError(
            f"{path}: sha256 {found}, its record says {file.sha256}; the object is damaged: "
            "delete it and run the job that wrote it again"
        )
