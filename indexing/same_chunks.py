"""Finds the chunks of one dataset in another that holds the same documents: vectors of a training
set's chunks are copied from those of the retrieval set instead of being computed again.

Keeps 24 bytes for each document of the other dataset; opens only the shards that hold a match.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etl.dataset import Dataset
from etl.storage import StageFolder


class ChunkFinder:
    """Documents of `dataset` by content hash; of equal ones, the first stands for all."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        folder = StageFolder(dataset.url)
        tables = [
            np.load(folder.fetch(shard.docs), mmap_mode="r", allow_pickle=False)["content_hash"]
            for shard in dataset.manifest.shards
        ]
        hashes = np.concatenate([np.empty((0, 2), np.uint64), *tables])
        self._order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        self._first, self._second = hashes[self._order, 0], hashes[self._order, 1]

    def find(
        self, dataset: Dataset, ids: NDArray[np.int64], tokens: NDArray[Any]
    ) -> NDArray[np.int64]:
        """For each chunk of `dataset` (its id [N], its tokens [N, chunk_size]) the id of the same
        chunk of the same document here, -1 where there is none."""
        found = np.full(len(ids), -1, np.int64)
        if dataset.chunk_size != self.dataset.chunk_size:
            return found
        hashes, offsets = _places(dataset, ids)
        candidates = self._chunk_ids(self._documents(hashes), offsets)
        known = np.flatnonzero(candidates >= 0)
        theirs = self.dataset.get_chunk(candidates[known], continuation=False)
        known = known[(theirs == tokens[known]).all(axis=1)]
        found[known] = candidates[known]
        return found

    def _documents(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Number of the first document with each hash [N, 2], -1 if there is none."""
        slot = np.searchsorted(self._first, hashes[:, 0])
        end = np.searchsorted(self._first, hashes[:, 0], side="right")
        while True:
            behind = np.flatnonzero(slot < end)
            behind = behind[self._second[slot[behind]] < hashes[behind, 1]]
            if not len(behind):
                break
            slot[behind] += 1
        inside = np.flatnonzero(slot < end)
        inside = inside[self._second[slot[inside]] == hashes[inside, 1]]
        documents = np.full(len(hashes), -1, np.int64)
        documents[inside] = self._order[slot[inside]]
        return documents

    def _chunk_ids(
        self, documents: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Ids of the chunks that begin at these tokens of documents [N], -1 if there is none."""
        shards, stride = self.dataset.manifest.shards, self.dataset.manifest.stride
        documents_before, chunks_before = _bases(self.dataset)
        owner = np.searchsorted(documents_before, documents, side="right") - 1
        found = np.full(len(documents), -1, np.int64)
        for s in np.unique(owner[documents >= 0]):
            where = np.flatnonzero((owner == s) & (documents >= 0))
            reader = self.dataset.shard(int(s))[0]
            starts = np.append(reader.first_chunk, shards[s].num_chunks)
            local = documents[where] - documents_before[s]
            chunk = starts[local] + offsets[where] // stride
            there = (offsets[where] % stride == 0) & (chunk < starts[local + 1])
            found[where[there]] = chunk[there] + chunks_before[s]
        return found


def _places(
    dataset: Dataset, ids: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Of each chunk id [N]: the content hash [N, 2] of its document, and the token of the document
    that it begins at [N]."""
    hashes, offsets = np.empty((len(ids), 2), np.uint64), np.empty(len(ids), np.int64)
    _, chunks_before = _bases(dataset)
    owner = np.searchsorted(chunks_before, ids, side="right") - 1
    for s in np.unique(owner):
        where = np.flatnonzero(owner == s)
        reader, table = dataset.shard(int(s))
        local = ids[where] - chunks_before[s]
        document = reader.chunk_to_doc(local)
        hashes[where] = table["content_hash"][document]
        offsets[where] = (local - reader.first_chunk[document]) * dataset.manifest.stride
    return hashes, offsets


def _bases(dataset: Dataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Documents and chunks before each shard."""
    counts = [[shard.num_documents, shard.num_chunks] for shard in dataset.manifest.shards]
    before = np.cumsum([[0, 0], *counts], axis=0, dtype=np.int64)[:-1]
    return before[:, 0], before[:, 1]


@lru_cache(maxsize=1)
def chunk_finder(url: str) -> ChunkFinder:
    """The process's finder of chunks in one dataset."""
    return ChunkFinder(Dataset(url))
