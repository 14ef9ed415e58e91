"""A dataset: the shards of one manifest behind global ids. numpy and storage only, so every package
may use it.

A global chunk id is the shard's chunk base plus the id inside the shard; documents are numbered the
same way.
"""

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from etl.manifest import DOCUMENT_DTYPE, HELD_OUT, DatasetManifest, Shard, load_manifest
from etl.retmmap import RetMMapReader
from etl.storage import StageFolder, StorageError, StoredFile


class Dataset:
    """Shards are fetched and opened on first use; picklable, a copy opens its own maps.

    Raises:
        FileNotFoundError: `url` is not the folder of a finished dataset.
        StorageError: its manifest or a shard is damaged.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.manifest: DatasetManifest = load_manifest(url)
        counts = [[shard.num_chunks, shard.num_documents] for shard in self.manifest.shards]
        bases = np.cumsum([[0, 0], *counts], axis=0, dtype=np.int64)
        self._chunk_base, self._document_base = bases[:, 0], bases[:, 1]
        self._open: dict[int, tuple[RetMMapReader, NDArray[np.void]]] = {}
        self._columns: dict[tuple[str, int], NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_columns": {}}

    @property
    def num_chunks(self) -> int:
        return int(self._chunk_base[-1])

    @property
    def num_documents(self) -> int:
        return int(self._document_base[-1])

    @property
    def chunk_size(self) -> int:
        return self.manifest.chunk_size

    def shard(self, i: int) -> tuple[RetMMapReader, NDArray[np.void]]:
        """Shard i: its token file and its document table (DOCUMENT_DTYPE)."""
        if i not in self._open:
            self._open[i] = self._open_shard(self.manifest.shards[i])
        return self._open[i]

    def _open_shard(self, shard: Shard) -> tuple[RetMMapReader, NDArray[np.void]]:
        folder = StageFolder(self.url)
        reader = RetMMapReader(folder.fetch(shard.bin), folder.fetch(shard.idx))
        documents = np.load(folder.fetch(shard.docs), mmap_mode="r", allow_pickle=False)
        found = (
            reader.layout,
            reader.num_documents,
            reader.num_chunks,
            documents.dtype,
            len(documents),
        )
        expected = (
            self.manifest.layout,
            shard.num_documents,
            shard.num_chunks,
            DOCUMENT_DTYPE,
            shard.num_documents,
        )
        if found != expected:
            raise StorageError(f"{reader.idx_path}: found {found}, the manifest says {expected}")
        return reader, documents

    def _by_shard(
        self, ids: NDArray[np.int64], base: NDArray[np.int64]
    ) -> list[tuple[int, NDArray[np.intp]]]:
        """(shard, positions in `ids` that fall into it)."""
        if ids.size and (ids.min() < 0 or ids.max() >= base[-1]):
            raise IndexError(
                f"{self.url}: ids {ids.min()}..{ids.max()}; the dataset holds 0..{base[-1] - 1}"
            )
        owner = np.searchsorted(base, ids, side="right") - 1
        return [(int(s), np.flatnonzero(owner == s)) for s in np.unique(owner)]

    def get_chunk(self, chunk_ids: ArrayLike, continuation: bool = True) -> NDArray[Any]:
        """[N, chunk_size] tokens of chunks [N], or [N, 2 chunk_size] with the continuation
        (retrieval dataset).

        Raises:
            IndexError: an id outside 0..num_chunks - 1.
        """
        ids = np.asarray(chunk_ids, np.int64)
        layout = self.manifest.layout
        width = self.chunk_size * (2 if continuation and layout.retrieval_db else 1)
        out = np.empty((len(ids), width), layout.dtype)
        for s, where in self._by_shard(ids, self._chunk_base):
            out[where] = self.shard(s)[0].get_chunk(ids[where] - self._chunk_base[s], continuation)
        return out

    def chunk_to_doc(self, chunk_ids: ArrayLike) -> NDArray[np.int64]:
        """Document number of each chunk id [N]."""
        ids = np.asarray(chunk_ids, np.int64)
        out = np.empty(len(ids), np.int64)
        for s, where in self._by_shard(ids, self._chunk_base):
            out[where] = (
                self.shard(s)[0].chunk_to_doc(ids[where] - self._chunk_base[s])
                + self._document_base[s]
            )
        return out

    @cached_property
    def documents(self) -> NDArray[np.void]:
        """[num_documents] the document tables of all shards, DOCUMENT_DTYPE (40 bytes each)."""
        return np.concatenate(
            [
                np.empty(0, DOCUMENT_DTYPE),
                *(self.shard(i)[1] for i in range(len(self.manifest.shards))),
            ]
        )

    @cached_property
    def document_keys(self) -> NDArray[np.uint64]:
        """[num_documents] first 64 bits of the content hash: equal text has equal keys in any
        dataset.
        """
        return np.ascontiguousarray(self.documents["content_hash"][:, 0])

    @cached_property
    def document_clusters(self) -> NDArray[np.uint64]:
        """[num_documents] cluster of near-duplicates that each document belongs to; a document
        without any is a cluster of its own, named by its key."""
        return np.ascontiguousarray(self.documents["cluster"])

    @cached_property
    def document_first_chunk(self) -> NDArray[np.int64]:
        """[num_documents + 1] id of each document's first chunk, then num_chunks."""
        firsts = [
            self.shard(i)[0].first_chunk + self._chunk_base[i]
            for i in range(len(self.manifest.shards))
        ]
        return np.concatenate([*firsts, [self.num_chunks]]).astype(np.int64)

    def chunk_keys(self, chunk_ids: ArrayLike) -> NDArray[np.uint64]:
        """[..., 2] document key and cluster of the document that each chunk id [...] belongs to.

        Chunks of which either is the same must not be neighbors of one another.
        """
        ids = np.asarray(chunk_ids, np.int64)
        keys = np.empty((ids.size, 2), np.uint64)
        for s, where in self._by_shard(ids.ravel(), self._chunk_base):
            reader, documents = self.shard(s)
            rows = documents[reader.chunk_to_doc(ids.ravel()[where] - self._chunk_base[s])]
            keys[where, 0], keys[where, 1] = rows["content_hash"][:, 0], rows["cluster"]
        return keys.reshape(*ids.shape, 2)

    def chunk_spans(self, document_keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """[N, 2] first chunk id, and last + 1, of a document with each key [N]; 0, 0 if there is
        none."""
        keys, numbers = self._documents_by_key
        places = np.minimum(np.searchsorted(keys, document_keys), max(0, len(keys) - 1))
        first = self.document_first_chunk
        spans = np.zeros((len(document_keys), 2), np.int64)
        if len(keys):
            known = keys[places] == document_keys
            documents = numbers[places[known]]
            spans[known, 0], spans[known, 1] = first[documents], first[documents + 1]
        return spans

    @cached_property
    def _documents_by_key(self) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
        order = np.argsort(self.document_keys)
        return self.document_keys[order], order

    def is_all_pad(self, chunk_ids: ArrayLike) -> NDArray[np.bool_]:
        """Whether each chunk [N] holds nothing but pads."""
        return (self.get_chunk(chunk_ids, continuation=False) == self.manifest.pad_id).all(axis=1)

    def chunk_bytes(self, chunk_ids: ArrayLike) -> NDArray[np.int64]:
        """Bytes of text that each chunk [N] stands for."""
        ids = np.asarray(chunk_ids, np.int64)
        out = np.empty(len(ids), np.int64)
        for s, where in self._by_shard(ids, self._chunk_base):
            out[where] = self._column("chunk_bytes", s)[ids[where] - self._chunk_base[s]]
        return out

    def encoder_ids(self, chunk_ids: ArrayLike) -> NDArray[np.int32]:
        """[N, width] the embedder's token ids of each chunk [N], filled up with its pad id.

        Raises:
            StorageError: the dataset was prepared without an embedder.
        """
        if self.manifest.encoder is None:
            raise StorageError(
                f"{self.url} holds no encoder ids; prepare it with the option embedder"
            )
        ids = np.asarray(chunk_ids, np.int64)
        parts = [
            (where, self._column("encoder", s)[ids[where] - self._chunk_base[s]])
            for s, where in self._by_shard(ids, self._chunk_base)
        ]
        width = max((rows.shape[1] for _, rows in parts), default=0)
        out = np.full((len(ids), width), self.manifest.encoder.pad_id, np.int32)
        for where, rows in parts:
            out[where, : rows.shape[1]] = rows
        return out

    def _column(self, name: str, s: int) -> NDArray[Any]:
        """Shard s's memory-mapped array with a row a chunk."""
        if (name, s) not in self._columns:
            shard = self.manifest.shards[s]
            file: StoredFile = getattr(shard, name)
            rows = np.load(StageFolder(self.url).fetch(file), mmap_mode="r", allow_pickle=False)
            if len(rows) != shard.num_chunks:
                raise StorageError(
                    f"{self.url}/{file.name}: {len(rows)} rows for {shard.num_chunks} chunks"
                )
            self._columns[name, s] = rows
        return self._columns[name, s]


def check_no_leak(held_out: Dataset, retrieval: Dataset) -> None:
    """Refuses a retrieval dataset that holds documents, or near-duplicates, of a held-out dataset.

    Raises:
        StorageError: with the number of shared documents and one of them.
    """
    if held_out.manifest.split not in HELD_OUT:
        return
    shared = np.isin(retrieval.document_keys, held_out.document_keys)
    shared |= np.isin(retrieval.document_clusters, held_out.document_clusters)
    if shared.any():
        row = retrieval.documents[int(np.flatnonzero(shared)[0])]
        raise StorageError(
            f"{retrieval.url} holds {int(shared.sum())} documents that are held out in "
            f"{held_out.url}, or near-duplicates of them; the first is in "
            f"{retrieval.manifest.sources[row['source']]} at byte {row['offset']}. Prepare both "
            "from one input, or take the documents out"
        )
