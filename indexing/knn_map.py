"""KNN map: for each chunk of a training file, the ids of its neighbors in the retrieval file.

Written by the KNN map job in shards and merged; read by the trainer. Byte-compatible with NeMo's
RETRO. numpy only.

    offset  type      field
    0       9 bytes   b"KNNRETM\\0\\0"
    9       u64       version = 1
    17      u64       K, neighbors a row
    25      u64       number of rows L
    33      u64       chunk_start: row r belongs to training chunk chunk_start + r
    41      i64[L, K] retrieval chunk ids, best first; -1 = no neighbor
"""

import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAGIC = b"KNNRETM\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQQQQ")
NO_NEIGHBOR = -1
_BLOCK_ROWS = 1 << 18


class KNNMapError(ValueError):
    """A neighbor map that is not what its header promises, or maps that do not fit together."""


def write_header(file: BinaryIO, k: int, rows: int, chunk_start: int) -> None:
    """Writes the 41 header bytes; the rows follow as little-endian i64."""
    if k < 1 or chunk_start < 0:
        raise KNNMapError(
            f"K is {k} and chunk_start {chunk_start}; expected K >= 1 and chunk_start >= 0"
        )
    file.write(HEADER.pack(MAGIC, VERSION, k, rows, chunk_start))


def write_knn_map(file: BinaryIO, neighbors: NDArray[np.int64], chunk_start: int = 0) -> None:
    """Writes a whole map: neighbors [L, K], row r for training chunk chunk_start + r.

    Raises:
        KNNMapError: not two-dimensional integers, K = 0, an id below -1, or a negative chunk_start.
    """
    if neighbors.ndim != 2 or neighbors.dtype.kind not in "iu":
        raise KNNMapError(
            f"neighbors are {neighbors.dtype}{list(neighbors.shape)}; expected integers [rows, K]"
        )
    if neighbors.size and neighbors.min() < NO_NEIGHBOR:
        raise KNNMapError(
            f"neighbor id {neighbors.min()}; expected chunk ids, or -1 for no neighbor"
        )
    write_header(file, neighbors.shape[1], neighbors.shape[0], chunk_start)
    write_rows(file, neighbors)


def write_rows(file: BinaryIO, neighbors: NDArray[np.int64]) -> None:
    """Appends rows [n, K] to a map whose header promises them."""
    file.write(np.ascontiguousarray(neighbors, "<i8").tobytes())


class KNNMap:
    """A memory-mapped neighbor map; `neighbors` is the read-only [rows, K] matrix.

    Raises:
        FileNotFoundError: no such file.
        KNNMapError: wrong magic or version, K = 0, or a file shorter or longer than its header
            promises.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        raw = np.fromfile(self.path, np.uint8, HEADER.size).tobytes()
        if len(raw) < HEADER.size:
            raise KNNMapError(
                f"{path}: {len(raw)} bytes; a KNN map header has {HEADER.size}. The file is "
                "truncated"
            )
        magic, version, k, rows, self.chunk_start = HEADER.unpack(raw)
        if magic != MAGIC:
            raise KNNMapError(
                f"{path}: starts with {magic!r}, expected {MAGIC!r}; this is not a KNN map"
            )
        if version != VERSION:
            raise KNNMapError(f"{path}: version {version}; this reader knows version {VERSION}")
        if k < 1:
            raise KNNMapError(f"{path}: K is {k}; expected 1 or more")
        found, expected = self.path.stat().st_size, HEADER.size + 8 * k * rows
        if found != expected:
            kind = "truncated" if found < expected else "over-long"
            raise KNNMapError(
                f"{path}: {found} bytes, but {rows} rows of K={k} need {expected}; the file is "
                f"{kind}"
            )
        self.neighbors: NDArray[np.int64] = self._map(rows, k)

    def _map(self, rows: int, k: int) -> NDArray[np.int64]:
        if rows == 0:
            return np.empty((0, k), "<i8")
        return np.memmap(self.path, "<i8", "r", HEADER.size, (rows, k))

    @property
    def k(self) -> int:
        return self.neighbors.shape[1]

    @property
    def rows(self) -> int:
        return self.neighbors.shape[0]

    @property
    def chunk_stop(self) -> int:
        return self.chunk_start + self.rows

    def get(self, chunk_ids: ArrayLike) -> NDArray[np.int64]:
        """[..., K] neighbors of training chunks (a copy).

        Raises:
            IndexError: an id outside chunk_start .. chunk_start + rows - 1.
        """
        ids = np.asarray(chunk_ids, np.int64)
        if ids.size and (ids.min() < self.chunk_start or ids.max() >= self.chunk_stop):
            raise IndexError(
                f"{self.path}: chunks {ids.min()}..{ids.max()}; the map holds "
                f"{self.chunk_start}..{self.chunk_stop - 1}"
            )
        return np.array(self.neighbors[ids - self.chunk_start])

    def check_ids(self, num_chunks: int) -> None:
        """Reads the whole map and raises KNNMapError on an id outside -1 .. num_chunks - 1."""
        for start in range(0, self.rows, _BLOCK_ROWS):
            block = self.neighbors[start : start + _BLOCK_ROWS]
            if block.min() < NO_NEIGHBOR or block.max() >= num_chunks:
                raise KNNMapError(
                    f"{self.path}: ids {block.min()}..{block.max()} in rows from {start}; expected "
                    f"-1..{num_chunks - 1}"
                )


def first_allowed(
    ids: NDArray[np.int64], banned: NDArray[np.bool_], keep: int
) -> NDArray[np.int64]:
    """[..., keep] the first ids of rows [..., K] that are not banned [..., K], then -1."""
    order = banned.argsort(axis=-1, kind="stable")[..., :keep]
    return np.take_along_axis(np.where(banned, NO_NEIGHBOR, ids), order, axis=-1)


def merge(parts: Sequence[KNNMap], file: BinaryIO) -> None:
    """Writes the rows of all parts, sorted by chunk_start, as one map.

    Raises:
        KNNMapError: no parts, different K, or ranges that overlap or leave a gap.
    """
    if not parts:
        raise KNNMapError("nothing to merge: expected at least one map")
    ordered = sorted(parts, key=lambda part: (part.chunk_start, part.rows))
    for before, after in pairwise(ordered):
        if before.k != after.k:
            raise KNNMapError(
                f"{after.path} has K={after.k}, {before.path} has K={before.k}; expected one K"
            )
        if after.chunk_start != before.chunk_stop:
            kind = "overlap" if after.chunk_start < before.chunk_stop else "leave a gap"
            raise KNNMapError(
                f"{before.path} ends at chunk {before.chunk_stop}, {after.path} starts at "
                f"{after.chunk_start}: they {kind}"
            )
    write_header(file, ordered[0].k, sum(part.rows for part in ordered), ordered[0].chunk_start)
    for part in ordered:
        for start in range(0, part.rows, _BLOCK_ROWS):
            file.write(part.neighbors[start : start + _BLOCK_ROWS].tobytes())
