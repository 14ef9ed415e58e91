"""Records of any input to documents: which fields are used, and what makes a record unusable."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from etl.sources import Range, SourceFile, check_unchanged

SPLIT_NAMES = ("train", "validation", "test", "retrieval")
MAX_RECORD_BYTES = 512 << 20


class BadRecordError(ValueError):
    """A record that cannot become a document, when the job was told to fail on one."""


@dataclass(frozen=True)
class Fields:
    """Names of a record's fields. `text_key` must be there; the others are used where they are.

    apply_ftfy mends text that was decoded with the wrong encoding (the library ftfy).
    """

    text_key: str = "text"
    id_key: str = "id"
    src_key: str = "src"
    title_key: str = "title"
    split_key: str | None = None
    apply_ftfy: bool = False

    @property
    def optional(self) -> list[str]:
        keys = (self.id_key, self.src_key, self.title_key, self.split_key)
        return [key for key in keys if key]


class Document(NamedTuple):
    """A usable record. `offset` is the byte where its line starts (uncompressed), or its row in a
    Parquet file."""

    source: int
    offset: int
    text: str
    content_hash: bytes
    text_bytes: int
    split: str | None = None
    id: str | None = None
    src: str | None = None
    title: str | None = None


class Reject(NamedTuple):
    """A record that was skipped, and why."""

    source: int
    offset: int
    reason: str


@dataclass(frozen=True)
class RecordReader:
    """Reads the records of splits; picklable."""

    sources: tuple[SourceFile, ...]
    fields: Fields

    def read(self, ranges: Sequence[Range]) -> Iterator[Document | Reject]:
        """Every record that starts in one of the ranges, in order, usable or not.

        Raises:
            CompressedError, InputError: a damaged file, or one that changed since it was listed.
        """
        for part in ranges:
            yield from self._read_range(part)
            check_unchanged(self.sources[part.source])

    def _read_range(self, part: Range) -> Iterator[Document | Reject]:
        source = self.sources[part.source]
        if source.kind == "parquet":
            from etl.parquet_rows import read_rows

            wanted = [self.fields.text_key, *self.fields.optional]
            for row, record in read_rows(source, part, wanted):
                yield self.document(record, part.source, row)
        elif source.kind == "text":
            from etl.plain_text import read_text

            yield self._plain(part.source, source, read_text(source))
        else:
            from etl.loose_json import read_lines

            for offset, record in read_lines(source, part):
                yield self.document(record, part.source, offset)

    def _plain(self, source: int, file: SourceFile, text: str | ValueError) -> Document | Reject:
        key = self.fields.text_key
        record = {key: text, self.fields.id_key: file.name, self.fields.title_key: file.name}
        return self.document(text if isinstance(text, ValueError) else record, source, 0)

    def document(self, record: Any, source: int, offset: int) -> Document | Reject:
        """A parsed record to a document, or the reason why not; a ValueError is its own reason."""
        reason = self._unusable(record)
        if reason:
            return Reject(source, offset, reason)
        fields = self.fields
        text: str = record[fields.text_key]
        if fields.apply_ftfy:
            text = _fix_text(text)
        data = text.encode()
        split, name, src, title = (
            record.get(key) if key else None
            for key in (fields.split_key, fields.id_key, fields.src_key, fields.title_key)
        )
        digest = hashlib.blake2b(data, digest_size=16).digest()
        details = (_plain_value(name), _plain_value(src), _plain_value(title))
        return Document(source, offset, text, digest, len(data), split, *details)

    def _unusable(self, record: Any) -> str | None:
        if isinstance(record, ValueError):
            return str(record)
        if not isinstance(record, dict):
            return f"a JSON {type(record).__name__}, expected an object"
        key = self.fields.text_key
        text = record.get(key)
        if text is None:
            return f"field {key!r} is null" if key in record else f"no field {key!r}"
        if not isinstance(text, str):
            return f"field {key!r} is a {type(text).__name__}, expected a string"
        if not text or text.isspace():
            return f"field {key!r} is empty"
        split = record.get(self.fields.split_key) if self.fields.split_key else None
        if split is not None and split not in SPLIT_NAMES:
            return (
                f"field {self.fields.split_key!r} is {str(split)[:40]!r}, expected train, "
                "validation, test or retrieval"
            )
        return None


def _plain_value(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else str(value)


def _fix_text(text: str) -> str:
    import ftfy

    return ftfy.fix_text(text)
