"""The manifest of a dataset: which retmmap shards belong to it, in which order, and what they were
made from.

Written last by preparation (the commit point), read by everything else. Standard library and numpy
dtypes only.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from etl.retmmap import Layout
from etl.storage import StorageError, StoredFile, content_key, join_url, read_json

FORMAT = "retromill-dataset"
VERSION = 1
NAME = "manifest.json"
Split = Literal["train", "validation", "test", "retrieval"]
HELD_OUT: tuple[Split, ...] = ("validation", "test")

DOCUMENT_DTYPE = np.dtype(
    [
        ("content_hash", "<u8", 2),
        ("cluster", "<u8"),
        ("source", "<i4"),
        ("offset", "<i8"),
        ("text_bytes", "<i8"),
        ("num_tokens", "<i8"),
    ]
)
"""One row a document in a shard's `.docs.npy`: content hash (128 bits); cluster of near-duplicates,
named by the first 64 bits of the content hash of its first document (its own, if it is alone);
number of the source file in `DatasetManifest.sources`; byte offset of its line there (uncompressed;
the row in a Parquet file); UTF-8 bytes of its text; tokens with end-of-document, without pads."""


@dataclass(frozen=True)
class Encoder:
    """The embedder whose token ids the shards' `.encoder.npy` hold: name, fingerprint of its
    tokenizer, tokens at which it cuts a text off, and the id that fills rows up."""

    name: str
    fingerprint: str
    max_length: int
    pad_id: int


@dataclass(frozen=True)
class Shard:
    """One retmmap file pair and what belongs to it.

    Attributes:
        bin: Tokens (`etl/retmmap.py`).
        idx: Addresses of documents and chunks.
        docs: DOCUMENT_DTYPE [num_documents] (`.docs.npy`).
        info: Parquet, a row a document: number in the shard, source file, offset, id, src, title,
            text_bytes, num_tokens (`.info.parquet`).
        chunk_bytes: u32 [num_chunks], UTF-8 bytes of text that each chunk's tokens stand for
            (`.chunk_bytes.npy`).
        encoder: [num_chunks, width] the embedder's token ids of each chunk's text, filled up with
            its pad id (`.encoder.npy`); None if no embedder was named.
    """

    bin: StoredFile
    idx: StoredFile
    docs: StoredFile
    info: StoredFile
    chunk_bytes: StoredFile
    encoder: StoredFile | None
    num_documents: int
    num_chunks: int
    num_tokens: int
    text_bytes: int


@dataclass(frozen=True)
class DatasetManifest:
    """num_tokens counts text and end-of-document tokens, no pads. Shards are in document order.

    split_rule says how documents were assigned to splits and which were taken for duplicates;
    held_back counts documents that are not in the retrieval set because they, or near-duplicates of
    them, are held out.
    """

    split: Split
    chunk_size: int
    stride: int
    dtype_code: int
    pad_id: int
    eod_id: int
    eod_token: str
    vocab_size: int
    tokenizer: StoredFile
    tokenizer_fingerprint: str
    encoder: Encoder | None
    split_rule: dict[str, Any]
    held_back: int
    sources: tuple[str, ...]
    shards: tuple[Shard, ...]

    @property
    def layout(self) -> Layout:
        return Layout(self.chunk_size, self.stride, self.dtype_code, self.split == "retrieval")

    @property
    def fingerprint(self) -> str:
        """32 hex digits over the content: tokenizer and the hashes of all shards."""
        return content_key(FORMAT, VERSION, asdict(self))

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)

    @property
    def num_chunks(self) -> int:
        return sum(shard.num_chunks for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            **asdict(self),
        }


def load_manifest(dataset_url: str) -> DatasetManifest:
    """The manifest in a dataset folder.

    Raises:
        FileNotFoundError: the folder holds no manifest, so no finished dataset.
        StorageError: another format or version, missing fields, or content that does not match its
            fingerprint.
    """
    url = join_url(dataset_url, NAME)
    try:
        found = read_json(url)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{url}: no such file; expected the folder of a finished dataset (run "
            "jobs.prepare_data, and name one of the "
            "folders it prints)"
        ) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise StorageError(f"{url}: expected a manifest with format {FORMAT!r}")
    if found.get("version") != VERSION:
        raise StorageError(
            f"{url}: version {found.get('version')!r}; this code reads version {VERSION}"
        )
    missing = [f.name for f in fields(DatasetManifest) if f.name not in found]
    if missing:
        raise StorageError(f"{url}: fields {missing} are missing; prepare the dataset again")
    manifest = _from_json(found)
    if manifest.fingerprint != found.get("fingerprint"):
        raise StorageError(
            f"{url}: fingerprint {found.get('fingerprint')} does not match the content; it was "
            "edited"
        )
    return manifest


SHARD_FILES = ("bin", "idx", "docs", "info", "chunk_bytes", "encoder")


def shard_from_json(entry: dict[str, Any]) -> Shard:
    """A shard from the plain values that records and manifests hold."""
    files = {part: StoredFile(**entry[part]) for part in SHARD_FILES if entry[part]}
    return Shard(**{**entry, **files})


def _from_json(found: dict[str, Any]) -> DatasetManifest:
    plain = {f.name: found[f.name] for f in fields(DatasetManifest)}
    return DatasetManifest(
        **plain
        | {
            "tokenizer": StoredFile(**plain["tokenizer"]),
            "encoder": plain["encoder"] and Encoder(**plain["encoder"]),
            "sources": tuple(plain["sources"]),
            "shards": tuple(shard_from_json(entry) for entry in plain["shards"]),
        }
    )
