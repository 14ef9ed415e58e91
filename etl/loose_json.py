"""Loose JSON (one object a line) to documents: which byte ranges a task reads, and what it finds
there.

Files are read through fsspec in ranges of a few dozen megabytes; a line belongs to the split that
holds its first byte, so splits can be cut anywhere. `.gz` and `.zst` files cannot be cut and go
whole to one split.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import orjson

from etl.compressed import open_source
from etl.storage import filesystem_of, sha256_of

_HASHED_WHOLE_BYTES = 256 << 20
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = tuple(f".{kind}{packed}" for kind in ("jsonl", "json") for packed in ("", *_COMPRESSION))


class InputError(ValueError):
    """Input files that cannot be used as named."""


class BadRecordError(ValueError):
    """A record that cannot become a document, when the job was told to fail on one."""


@dataclass(frozen=True)
class SourceFile:
    """One input file. `version` changes when the content does: ETag of an object, sha256 or time of
    a local file.
    """

    url: str
    name: str
    bytes: int
    version: str

    @property
    def compression(self) -> str | None:
        return next(
            (codec for suffix, codec in _COMPRESSION.items() if self.url.endswith(suffix)), None
        )


@dataclass(frozen=True)
class Range:
    """Bytes start..stop of source file number `source`; a compressed file is always whole."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class Document:
    """A usable record. `offset` is the byte where its line starts (uncompressed)."""

    source: int
    offset: int
    text: str
    split: str | None
    content_hash: bytes


@dataclass(frozen=True)
class Reject:
    """A record that was skipped, and why."""

    source: int
    offset: int
    reason: str


def find_sources(urls: Sequence[str]) -> list[SourceFile]:
    """The input files behind files, folders and globs, sorted by url.

    Raises:
        FileNotFoundError: a url that matches nothing.
        InputError: a file named twice, a file of an unknown kind, or no bytes at all.
    """
    found: list[str] = []
    for url in urls:
        matches = _expand(url)
        if not matches:
            raise FileNotFoundError(
                f"{url}: no file, no folder with {', '.join(SUFFIXES)} files, and no glob that "
                "matches"
            )
        found += matches
    repeated = (
        sorted({url for url in found if found.count(url) > 1})
        if len(set(found)) != len(found)
        else []
    )
    if repeated:
        raise InputError(f"{repeated[0]} is among the inputs more than once; name each file once")
    found.sort()
    root = _common_folder(found)
    sources = [_source(url, url[len(root) :]) for url in found]
    if not any(source.bytes for source in sources):
        raise InputError(f"all {len(sources)} input files are empty, the first is {sources[0].url}")
    return sources


def _expand(url: str) -> list[str]:
    filesystem, path = filesystem_of(url)
    filesystem.invalidate_cache()
    if filesystem.isfile(path):
        if not path.endswith(SUFFIXES):
            raise InputError(f"{url}: expected a file ending in {', '.join(SUFFIXES)}")
        paths = [path]
    elif filesystem.isdir(path):
        paths = [p for p in filesystem.find(path) if p.endswith(SUFFIXES)]
    else:
        paths = [p for p in cast(list[str], filesystem.glob(path)) if p.endswith(SUFFIXES)]
    return [filesystem.unstrip_protocol(p) for p in paths]


def _common_folder(urls: Sequence[str]) -> str:
    """The longest prefix of all urls that ends in a slash."""
    first, last = min(urls), max(urls)
    same = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    return first[: first.rfind("/", 0, same) + 1]


def _source(url: str, name: str) -> SourceFile:
    filesystem, path = filesystem_of(url)
    info = filesystem.info(path)
    version = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("generation")
    if version is None and "file" in filesystem.protocol:
        small = info["size"] <= _HASHED_WHOLE_BYTES
        version = sha256_of(path) if small else f"mtime {info['mtime']}"
    return SourceFile(url, name, int(info["size"]), str(version or filesystem.checksum(path)))


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
            stop = source.bytes if source.compression else min(source.bytes, start + room)
            splits[-1].append(Range(i, start, stop))
            room -= stop - start
            start = stop
    return splits


def read_documents(
    sources: Sequence[SourceFile], ranges: Sequence[Range], text_key: str, split_key: str | None
) -> Iterator[Document | Reject]:
    """Every record whose line starts in one of the ranges, in order, usable or not. Blank lines are
    no records.
    """
    for part in ranges:
        for offset, line in _lines(sources[part.source], part):
            if line.strip():
                yield parse_record(line, part.source, offset, text_key, split_key)


def _lines(source: SourceFile, part: Range) -> Iterator[tuple[int, bytes]]:
    with open_source(source.url, source.compression) as file:
        position = part.start
        if part.start > 0:
            file.seek(part.start - 1)
            position += len(file.readline()) - 1
        stop = None if source.compression else part.stop
        while stop is None or position < stop:
            line = file.readline()
            if not line:
                return
            yield position, line
            position += len(line)


def parse_record(
    line: bytes, source: int, offset: int, text_key: str, split_key: str | None = None
) -> Document | Reject:
    """One line to a document, or the reason why not."""
    if offset == 0:
        line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Reject(source, offset, f"not JSON: {error.msg}")
    reason = _unusable(record, text_key, split_key)
    if reason:
        return Reject(source, offset, reason)
    text: str = record[text_key]
    split = record.get(split_key) if split_key else None
    return Document(
        source, offset, text, split, hashlib.blake2b(text.encode(), digest_size=16).digest()
    )


def _unusable(record: Any, text_key: str, split_key: str | None) -> str | None:
    if not isinstance(record, dict):
        return f"a JSON {type(record).__name__}, expected an object"
    if text_key not in record:
        return f"no field {text_key!r}"
    text = record[text_key]
    if not isinstance(text, str):
        return f"field {text_key!r} is a {type(text).__name__}, expected a string"
    if not text.strip():
        return f"field {text_key!r} is empty"
    split = record.get(split_key) if split_key else None
    if split is not None and split not in ("train", "validation", "test", "retrieval"):
        return (
            f"field {split_key!r} is {str(split)[:40]!r}, expected train, validation, test or "
            "retrieval"
        )
    return None
