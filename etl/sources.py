"""Input files: found behind files, folders and globs on any fsspec URL, and cut into splits.

Files are read in ranges of a few dozen megabytes; a line (or a Parquet row group) belongs to the
split that holds its first byte, so splits can be cut anywhere. Compressed files and plain-text
files cannot be cut and go whole to one split.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from etl.storage import filesystem_of, sha256_of

log = logging.getLogger(__name__)
_HASHED_BYTES = 256 << 20
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_KINDS: dict[str, Literal["lines", "text", "parquet"]] = {
    ".jsonl": "lines",
    ".json": "lines",
    ".txt": "text",
}
SUFFIXES = (
    *(f"{kind}{packed}" for kind in _KINDS for packed in ("", *_COMPRESSION)),
    ".parquet",
)


class InputError(ValueError):
    """Input files that cannot be used as named."""


@dataclass(frozen=True)
class SourceFile:
    """One input file. `version` changes when the content does: ETag of an object, sha256 or time of
    a local file. `name` is its path below the folder that all inputs share."""

    url: str
    name: str
    bytes: int
    version: str

    @property
    def compression(self) -> str | None:
        return next(
            (codec for suffix, codec in _COMPRESSION.items() if self.url.endswith(suffix)), None
        )

    @property
    def kind(self) -> Literal["lines", "text", "parquet"]:
        """How records are found in it: a JSON object a line, the whole file, or Parquet rows."""
        plain = self.url.removesuffix(".gz").removesuffix(".zst")
        for suffix, kind in _KINDS.items():
            if plain.endswith(suffix):
                return kind
        return "parquet"

    @property
    def is_whole(self) -> bool:
        return self.compression is not None or self.kind == "text"


@dataclass(frozen=True)
class Range:
    """Bytes start..stop of source file number `source`; a file that cannot be cut is always
    whole."""

    source: int
    start: int
    stop: int


def find_sources(urls: Sequence[str]) -> list[SourceFile]:
    """The input files behind files, folders and globs, sorted by url.

    Raises:
        FileNotFoundError: a url that matches nothing.
        InputError: a file named twice, a file of an unknown kind, or no bytes at all.
    """
    found: dict[str, dict[str, Any]] = {}
    for url in urls:
        matches = _expand(url)
        if not matches:
            raise FileNotFoundError(
                f"{url}: no file, no folder with {', '.join(SUFFIXES)} files, and no glob that "
                "matches"
            )
        repeated = sorted(matches.keys() & found.keys())
        if repeated:
            raise InputError(
                f"{repeated[0]} is among the inputs more than once; name each file once"
            )
        found |= matches
    names = sorted(found)
    root = _common_folder(names)
    are_hashed = sum(info["size"] for info in found.values()) <= _HASHED_BYTES
    sources = [_source(url, url[len(root) :], found[url], are_hashed) for url in names]
    if not any(source.bytes for source in sources):
        raise InputError(f"all {len(sources)} input files are empty, the first is {sources[0].url}")
    return sources


def _expand(url: str) -> dict[str, dict[str, Any]]:
    """Full url -> what the filesystem says of it."""
    filesystem, path = filesystem_of(url)
    filesystem.invalidate_cache()
    if filesystem.isfile(path):
        if not path.endswith(SUFFIXES):
            raise InputError(f"{url}: expected a file ending in {', '.join(SUFFIXES)}")
        found = {path: filesystem.info(path)}
    elif filesystem.isdir(path):
        found = cast(dict[str, Any], filesystem.find(path, detail=True))
    else:
        found = cast(dict[str, Any], filesystem.glob(path, detail=True))
    files = {p: info for p, info in found.items() if info["type"] == "file"}
    others = [p for p in files if not p.endswith(SUFFIXES)]
    if others:
        log.warning("%s: %d files of other kinds are not read, as %s", url, len(others), others[0])
    return {filesystem.unstrip_protocol(p): files[p] for p in files if p.endswith(SUFFIXES)}


def _common_folder(urls: Sequence[str]) -> str:
    """The longest prefix of all urls that ends in a slash."""
    first, last = min(urls), max(urls)
    same = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    return first[: first.rfind("/", 0, same) + 1]


def _source(url: str, name: str, info: dict[str, Any], is_hashed: bool) -> SourceFile:
    version = _tag(info)
    if version is None:
        filesystem, path = filesystem_of(url)
        if "file" in filesystem.protocol:
            version = sha256_of(path) if is_hashed else f"mtime {info['mtime']}"
        else:
            version = filesystem.checksum(path)
    return SourceFile(url, name, int(info["size"]), str(version))


def _tag(info: dict[str, Any]) -> Any:
    """What an object store calls the content of an object, if it does."""
    known = [info.get(key) for key in ("ETag", "etag", "md5Hash", "generation")]
    return next((value for value in known if value), None)


def check_unchanged(source: SourceFile) -> None:
    """Refuses a file that is not the one that the job was planned with (by size, and by tag where
    the storage has one).

    Raises:
        InputError: it has changed.
    """
    filesystem, path = filesystem_of(source.url)
    filesystem.invalidate_cache()
    info = filesystem.info(path)
    found = (int(info["size"]), str(_tag(info) or source.version))
    if found != (source.bytes, source.version):
        raise InputError(
            f"{source.url}: changed while the job ran, from {source.bytes} bytes "
            f"({source.version}) to {found[0]} ({found[1]}); run the job again"
        )


def plan_splits(sources: Sequence[SourceFile], split_bytes: int) -> list[list[Range]]:
    """Cuts the files, laid end to end in order, into splits of about `split_bytes`; small files
    share a split.

    Raises:
        InputError: split_bytes < 1.
    """
    if split_bytes < 1:
        raise InputError(f"split_bytes is {split_bytes}; expected 1 or more")
    splits: list[list[Range]] = []
    room = 0
    for i, source in enumerate(sources):
        start = 0
        while start < source.bytes:
            if room <= 0:
                splits.append([])
                room = split_bytes
            stop = source.bytes if source.is_whole else min(source.bytes, start + room)
            splits[-1].append(Range(i, start, stop))
            room -= stop - start
            start = stop
    return splits
