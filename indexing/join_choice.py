"""Which neighbors each sample keeps, decided before any token is moved. numpy and storage only.

The ban needs the keys of the documents that candidates belong to. Those of the whole retrieval
dataset are 24 bytes a document, put together once from its small files, without tokens.
"""

from dataclasses import asdict
from itertools import pairwise
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from etl.dataset import Dataset
from etl.npy_file import write_npy
from etl.retmmap import first_chunk_ids, read_sizes
from etl.storage import RangeReader, StageFolder, StoredFile, scratch_folder
from indexing.knn_manifest import BuiltMap
from indexing.knn_map import HEADER, MAGIC, NO_NEIGHBOR, VERSION, KNNMapError, first_allowed


class MapRows:
    """Rows of a finished KNN map by range requests: a map is larger than what one task needs of it.

    Raises:
        FileNotFoundError: no such file.
        KNNMapError: another header than a map has, or another size than it promises.
    """

    def __init__(self, built_map: BuiltMap) -> None:
        file = StoredFile(**built_map.manifest["files"]["map"])
        self._url = StageFolder(built_map.url).path_of(file.name)
        self._file = RangeReader(self._url)
        header = cast(bytes, self._file.read(HEADER.size))
        magic, version, self.k, self.rows, self.chunk_start = (
            HEADER.unpack(header) if len(header) == HEADER.size else (header, 0, 0, 0, 0)
        )
        if (magic, version) != (MAGIC, VERSION) or self.k < 1:
            raise KNNMapError(
                f"{self._url}: starts with {header!r}; expected {MAGIC!r}, version {VERSION}, K > 0"
            )
        found, expected = self._file.seek(0, 2), HEADER.size + 8 * self.k * self.rows
        if found != expected or found != file.bytes:
            raise KNNMapError(
                f"{self._url}: {found} bytes; its header promises {expected}, its manifest "
                f"{file.bytes}"
            )

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """[n, k] rows start .. stop - 1 of those there are (read-only)."""
        stop = min(stop, self.rows)
        row_bytes = 8 * self.k
        self._file.seek(HEADER.size + start * row_bytes)
        data = cast(bytes, self._file.read(max(0, stop - start) * row_bytes))
        return np.frombuffer(data, "<i8").reshape(-1, self.k)


def shard_stops(dataset: Dataset) -> NDArray[np.int64]:
    """Each shard's last chunk id + 1."""
    return np.cumsum([shard.num_chunks for shard in dataset.manifest.shards], dtype=np.int64)


def store_documents(folder: StageFolder, name: str, retrieval: Dataset, i: int) -> dict[str, Any]:
    """Stores the documents of retrieval shard i, u64[3, n]: id of the first chunk in the dataset,
    key and cluster. Publishes and returns their record."""
    source, shard = StageFolder(retrieval.url), retrieval.manifest.shards[i]
    sizes = read_sizes(source.fetch(shard.idx), shard.num_documents)
    base = int(shard_stops(retrieval)[i]) - shard.num_chunks
    documents = np.load(source.fetch(shard.docs), mmap_mode="r", allow_pickle=False)
    first = base + first_chunk_ids(retrieval.manifest.layout, sizes)[:-1]
    table = [first.astype("<u8"), documents["content_hash"][:, 0], documents["cluster"]]
    with scratch_folder(folder.url) as scratch:
        write_npy(scratch / "documents.npy", np.stack(table))
        [stored] = folder.store(name, scratch / "documents.npy")
    return folder.publish(name, {"files": {"table": asdict(stored)}})


class DocumentKeys:
    """Keys of the documents that chunks of the retrieval dataset belong to, from the stored tables
    of its shards, which are fetched and mapped on first use."""

    def __init__(self, folder: StageFolder, files: list[StoredFile], retrieval: Dataset) -> None:
        self._folder, self._files, self._stops = folder, files, shard_stops(retrieval)
        self._url, self._tables = retrieval.url, {}

    def of(self, chunks: NDArray[np.int64]) -> NDArray[np.uint64]:
        """[..., 2] document key and cluster of each chunk id [...].

        Raises:
            KNNMapError: an id that the dataset does not hold.
        """
        unique, places = np.unique(chunks, return_inverse=True)
        if unique.size and (unique[0] < 0 or unique[-1] >= self._stops[-1]):
            raise KNNMapError(
                f"neighbors {unique[0]}..{unique[-1]} in the map; {self._url} holds chunks "
                f"0..{self._stops[-1] - 1}"
            )
        keys = np.empty((len(unique), 2), np.uint64)
        bounds = pairwise([0, *unique.searchsorted(self._stops).tolist()])
        for s, (start, stop) in enumerate(bounds):
            if start < stop:
                table = self._table(s)
                own = unique[start:stop].astype(np.uint64)
                keys[start:stop] = table[1:, table[0].searchsorted(own, side="right") - 1].T
        return keys[places.reshape(chunks.shape)]

    def _table(self, s: int) -> NDArray[np.uint64]:
        if s not in self._tables:
            path = self._folder.fetch(self._files[s])
            self._tables[s] = np.load(path, mmap_mode="r", allow_pickle=False)
        return self._tables[s]


def kept_neighbors(
    ids: NDArray[np.int64], keys: NDArray[np.uint64], own: NDArray[np.uint64], keep: int
) -> NDArray[np.int64]:
    """[b, C, keep] the first of ids [b, C, k] that are there and whose document's keys
    [b, C, k, 2] are none of the sample's own [b, C, 2]; then -1.

    The same choice as NeighborReader's of `model/samples.py`.
    """
    same = [np.isin(found, held).any(axis=-1) for found, held in zip(keys, own)]
    return first_allowed(ids, (ids == NO_NEIGHBOR) | np.asarray(same), keep)
