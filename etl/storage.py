"""Objects on any fsspec URL: atomic writes, create-only records, checksummed local copies.

Every stage of the data path keeps its output in a `StageFolder`. Object stores have no rename, so a
file is first written to local scratch, then stored under a name that contains its own hash (two
attempts that differ never collide, two that agree are the same object), and only then announced by
a small create-only record. Readers trust records.

fsspec and the standard library only.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

log = logging.getLogger(__name__)

CACHE_VARIABLE = "RETROMILL_CACHE"
CACHE_BYTES_VARIABLE = "RETROMILL_CACHE_BYTES"
DEFAULT_CACHE_BYTES = 256 << 30
_COPY_BYTES = 8 << 20


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
    """The filesystem behind `url` and the path inside it."""
    filesystem, path = url_to_fs(url)
    return filesystem, path


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
        _put(local, url)


def _put(local: Path, url: str) -> None:
    filesystem, path = filesystem_of(url)
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.put_file(str(local), path)
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
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = os.path.join(os.path.dirname(path), f".scratch-{uuid.uuid4().hex}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)
    finally:
        os.unlink(temporary)
    _sync_folder(os.path.dirname(path))


@contextmanager
def scratch_folder(url: str) -> Iterator[Path]:
    """A local folder to write in before storing under `url`; on the same disk when `url` is local.
    Removed at exit."""
    filesystem, path = filesystem_of(url)
    if isinstance(filesystem, LocalFileSystem):
        scratch = Path(path) / f".scratch-{uuid.uuid4().hex}"
        scratch.mkdir(parents=True)
    else:
        scratch = Path(tempfile.mkdtemp(prefix="retromill-"))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
            stored.append(
                StoredFile(f"{stem}-{key}{''.join(path.suffixes)}", path.stat().st_size, digest)
            )
            _put(path, self.path_of(stored[-1].name))
        return stored

    def publish(self, record: str, value: dict[str, Any]) -> dict[str, Any]:
        """Create-only: the record that is in force afterwards, this one or an earlier attempt's."""
        url = self.path_of(f"{record}.json")
        create_json(url, value)
        return read_json(url)

    def record(self, record: str) -> dict[str, Any] | None:
        """The record, or None when it is absent or names a file that is missing or of another size.

        A record that cannot be trusted is removed, so that the work it stood for is done again.
        """
        url = self.path_of(f"{record}.json")
        try:
            value = read_json(url)
            self._check_sizes(value)
        except FileNotFoundError:
            return None
        except StorageError as error:
            log.warning("redoing %s: %s", record, error)
            filesystem, path = filesystem_of(url)
            filesystem.rm_file(path)
            return None
        return value

    def _check_sizes(self, record: dict[str, Any]) -> None:
        for entry in record.get("files", {}).values():
            self.check_size(StoredFile(**entry))

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
        return _cached_copy(filesystem, path, file)

    def remove_scratch(self) -> None:
        """Deletes what killed writers left in a local folder; call it once the stage is
        complete."""
        if is_local(self.url):
            for leftover in Path(filesystem_of(self.url)[1]).rglob(".scratch-*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _cached_copy(filesystem: fsspec.AbstractFileSystem, path: str, file: StoredFile) -> Path:
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "retromill")
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / file.sha256
    if target.exists() and target.stat().st_size == file.bytes:
        os.utime(target)
        return target
    temporary = cache / f".scratch-{uuid.uuid4().hex}"
    try:
        filesystem.get_file(path, str(temporary))
        found = sha256_of(temporary)
        if found != file.sha256:
            raise StorageError(
                f"{path}: sha256 {found}, its record says {file.sha256}; the object is damaged"
            )
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _evict(cache, keep=target)
    return target


def _evict(cache: Path, keep: Path) -> None:
    """Removes the least recently used copies beyond the bound; open memory maps of them stay
    valid."""
    bound = int(os.environ.get(CACHE_BYTES_VARIABLE) or DEFAULT_CACHE_BYTES)
    copies = sorted(
        (p for p in cache.iterdir() if len(p.name) == 64), key=lambda p: p.stat().st_mtime
    )
    total = sum(p.stat().st_size for p in copies)
    for copy in copies:
        if total <= bound:
            return
        if copy != keep:
            total -= copy.stat().st_size
            copy.unlink(missing_ok=True)
