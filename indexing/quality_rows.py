"""Tables about an index as Parquet files of whole numbers in a scratch folder: a row a chunk, and a
row a document. `indexing/quality_lists.py` adds the slots of neighbor lists,
`indexing/quality_tables.py` counts in all of them with Dask.

Written block by block by numpy, so memory does not grow with the dataset; strings and tokens enter
as 64-bit hashes, so pandas and cuDF read and compare the same numbers.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm
from xxhash import xxh64_intdigest

from etl.dataset import Dataset
from etl.storage import StageFolder, StoredFile
from indexing.built_index import BuiltIndex
from indexing.embeddings import Embeddings

ORIGINS = ("file", "folder", "package")
CHUNKS = ("chunk", "document", "tokens_hash", "vector_hash", "has_text", "is_found")
DOCUMENTS = ("document", "cluster", *ORIGINS)
_UNIT_ERROR = 2e-3
_NORMS = 1 << 20
_BLOCK_ROWS = 1 << 14
_DOCUMENT_COLUMNS = ["document", "source", "src"]


class TableWriter:
    """Writes a table's columns as a folder of Parquet files of some 2^18 rows: with many small ones
    Dask would be busy with their tasks. An empty table is a file without rows."""

    def __init__(self, folder: Path, names: Sequence[str], rows: int = 1 << 18) -> None:
        self._folder, self._rows, self._files = folder, rows, 0
        self._empty = {name: np.empty(0, np.int64) for name in names}
        self._parts: list[dict[str, NDArray[np.int64]]] = []

    def __enter__(self) -> "TableWriter":
        self._folder.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and (self._parts or not self._files):
            self._write()

    def add(self, columns: dict[str, NDArray[np.int64]]) -> None:
        """Appends rows: [N] of each column."""
        self._parts.append(columns)
        if sum(len(next(iter(part.values()))) for part in self._parts) >= self._rows:
            self._write()

    def _write(self) -> None:
        columns = {
            name: np.concatenate([empty, *(part[name] for part in self._parts)])
            for name, empty in self._empty.items()
        }
        table = pa.table({name: pa.array(values, pa.int64()) for name, values in columns.items()})
        pq.write_table(table, self._folder / f"part-{self._files:06d}.parquet")
        self._parts, self._files = [], self._files + 1


@dataclass(frozen=True)
class ChunkFacts:
    """What reading all chunks of the retrieval dataset and their vectors once gave.

    Attributes:
        token_counts: [chunk_size + 1] chunks by their number of tokens that are no pads.
        without_text: Chunks that stand for no bytes of text: all pads, or special tokens only.
        zero: Vectors of zeros; of these, zero_with_text belong to chunks that have text.
        not_finite: Vectors with an infinite or undefined entry.
        not_unit: Other vectors whose length is not 1 within 0.002, twice what fp16 can explain.
        norms: Lengths of finite vectors that are not zero, evenly spread over all chunks.
    """

    token_counts: NDArray[np.int64]
    without_text: int
    zero: int
    zero_with_text: int
    not_finite: int
    not_unit: int
    norms: NDArray[np.float64]


def write_chunks(folder: Path, retrieval: Dataset, index: BuiltIndex) -> ChunkFacts:
    """Writes chunk, document, hashes of tokens and vector, and whether it is in the index and has
    text, of every chunk.

    Raises:
        StorageError: an embeddings file is missing or damaged.
    """
    embeddings, stop = index.embeddings, index.manifest["indexed_chunks"]
    counts = np.zeros(retrieval.chunk_size + 1, np.int64)
    flaws, norms = np.zeros(5, np.int64), []
    apart = -(-retrieval.num_chunks // _NORMS)
    with TableWriter(folder, CHUNKS) as table:
        for first, vectors in _verified_blocks(embeddings):
            ids = np.arange(first, first + len(vectors))
            tokens = retrieval.get_chunk(ids, continuation=False)
            has_text = retrieval.chunk_bytes(ids) > 0
            counts += np.bincount(
                (tokens != retrieval.manifest.pad_id).sum(axis=1), minlength=len(counts)
            )
            lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
            flaws += _flaws(lengths, has_text)
            usable = np.isfinite(lengths) & (lengths > 0)
            norms.append(lengths[usable & (ids % apart == 0)])
            columns = {
                "chunk": ids,
                "document": retrieval.chunk_to_doc(ids),
                "tokens_hash": hashes(map(bytes, np.ascontiguousarray(tokens))),
                "vector_hash": hashes(map(bytes, np.ascontiguousarray(vectors))),
                "has_text": has_text.astype(np.int64),
                "is_found": (usable & (ids < stop)).astype(np.int64),
            }
            table.add(columns)
    without_text, zero, zero_with_text, not_finite, not_unit = flaws.tolist()
    return ChunkFacts(
        counts, without_text, zero, zero_with_text, not_finite, not_unit, np.concatenate(norms)
    )


def _flaws(lengths: NDArray[np.float64], has_text: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[5] the counts of ChunkFacts, in order."""
    finite, zero = np.isfinite(lengths), lengths == 0
    not_unit = finite & ~zero & (np.abs(lengths - 1) > _UNIT_ERROR)
    masks = (~has_text, zero, zero & has_text, ~finite, not_unit)
    return np.asarray([mask.sum() for mask in masks])


def _verified_blocks(embeddings: Embeddings) -> Iterator[tuple[int, NDArray[np.float16]]]:
    """(first chunk id, vectors) of small pieces of all blocks, whose bytes are checked."""
    files = embeddings.manifest["blocks"]
    for i, file in enumerate(tqdm(files, "chunks", unit="block", file=sys.stderr, mininterval=2)):
        StageFolder(embeddings.url).fetch_verified(StoredFile(**file))
        base, block = i * embeddings.block_chunks, embeddings.block(i)
        for start in range(0, len(block), _BLOCK_ROWS):
            yield base + start, block[start : start + _BLOCK_ROWS]


def write_documents(folder: Path, dataset: Dataset) -> None:
    """Writes each document's number, cluster, and the hashes of file, folder and package that it
    comes from."""
    first = 0
    with TableWriter(folder, DOCUMENTS) as table:
        for i in range(len(dataset.manifest.shards)):
            origins = [_origin_parts(origin) for origin in document_origins(dataset, i)]
            columns = {
                "document": np.arange(first, first + len(origins)),
                "cluster": dataset.shard(i)[1]["cluster"].astype(np.int64),
            }
            for number, name in enumerate(ORIGINS):
                columns[name] = hashes(parts[number].encode() for parts in origins)
            table.add(columns)
            first += len(origins)


def document_origins(dataset: Dataset, shard: int) -> list[str]:
    """Where each document of a shard comes from: what its record says (src), else its input
    file."""
    path = StageFolder(dataset.url).fetch(dataset.manifest.shards[shard].info)
    table = pq.read_table(path, columns=_DOCUMENT_COLUMNS)
    pairs = zip(table["src"].to_pylist(), table["source"].to_pylist(), strict=True)
    return [src or source for src, source in pairs]


def _origin_parts(origin: str) -> tuple[str, str, str]:
    """(file, folder, package) of a path or URL: all of it, without its last part, only its first
    part."""
    path = origin.rpartition("://")[2].strip("/")
    folder = path.rpartition("/")[0]
    return path, folder, folder.partition("/")[0]


def hashes(values: Iterable[bytes]) -> NDArray[np.int64]:
    """[N] 64-bit hashes as signed numbers."""
    return np.fromiter(map(xxh64_intdigest, values), np.uint64).view(np.int64)
