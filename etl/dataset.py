"""A dataset: the shards of one manifest behind global ids. numpy and storage only, so every package
may use it.

A global chunk id is the shard's chunk base plus the id inside the shard; documents are numbered the
same way.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from etl.cache import require_room
from etl.manifest import DOCUMENT_DTYPE, HELD_OUT, DatasetManifest, Shard, load_manifest
from etl.retmmap import RetMMapReader
from etl.storage import StageFolder, StorageError, StoredFile, is_local

_FETCHES = 8


class _Tokens(NamedTuple):
    """A shard's tokens, as views of its maps: `np.memmap` itself costs microseconds at each use.

    rows: [num_tokens / stride, stride]; each chunk is some of them, from its address on.
    addresses: [num_chunks] in bytes. They are not aligned in the file: `take` would copy them all.
    """

    rows: NDArray[Any]
    addresses: NDArray[np.int64]


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
        self._tokens: dict[int, _Tokens] = {}
        self._columns: dict[tuple[str, int], NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_tokens": {}, "_columns": {}}

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

    def open_all(self) -> None:
        """Opens every shard now, several at a time; remote ones are fetched.

        Raises:
            StorageError: a shard is damaged, or the local cache has no room for all of them.
        """
        shards = range(len(self.manifest.shards))
        if not is_local(self.url):
            files = [f for s in self.manifest.shards for f in (s.bin, s.idx, s.docs)]
            require_room(sum(file.bytes for file in files), self.url)
        with ThreadPoolExecutor(_FETCHES) as pool:
            list(tqdm(pool.map(self.shard, shards), self.url, len(shards), disable=None))

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

    def _tokens_of(self, i: int) -> _Tokens:
        if i not in self._tokens:
            reader = self.shard(i)[0]
            rows = np.asarray(reader.tokens).reshape(-1, reader.layout.stride)
            self._tokens[i] = _Tokens(rows, np.asarray(reader.chunk_addresses))
        return self._tokens[i]

    def _by_shard(
        self, ids: NDArray[np.int64], base: NDArray[np.int64]
    ) -> tuple[NDArray[np.intp], NDArray[np.int64], list[tuple[int, slice]]]:
        """The order [N] in which `ids` [N] ascend; the ids in that order, less the base of their
        shard; and each shard that has any, with the part of the order that is its own."""
        order = ids.argsort()
        ordered = ids[order]
        if ids.size and (ordered[0] < 0 or ordered[-1] >= base[-1]):
            raise IndexError(
                f"{self.url}: ids {ordered[0]}..{ordered[-1]}; the dataset holds 0..{base[-1] - 1}"
            )
        bounds = ordered.searchsorted(base)
        local = ordered - base[:-1].repeat(bounds[1:] - bounds[:-1])
        parts = [slice(start, stop) for start, stop in pairwise(bounds.tolist())]
        return order, local, [(s, part) for s, part in enumerate(parts) if part.start < part.stop]

    def get_chunk(self, chunk_ids: ArrayLike, continuation: bool = True) -> NDArray[Any]:
        """[N, chunk_size] tokens of chunks [N], or [N, 2 chunk_size] with the continuation
        (retrieval dataset).

        Raises:
            IndexError: an id outside 0..num_chunks - 1.
        """
        layout, ids = self.manifest.layout, np.asarray(chunk_ids, np.int64)
        stride, dtype = layout.stride, layout.dtype
        width = self.chunk_size * (2 if continuation and layout.retrieval_db else 1)
        order, local, parts = self._by_shard(ids, self._chunk_base)
        addresses = np.empty((len(ids), 1), np.int64)
        for s, part in parts:
            addresses[part, 0] = self._tokens_of(s).addresses[local[part]]
        rows = addresses // (stride * dtype.itemsize) + np.arange(width // stride)
        found = np.empty((len(ids), width // stride, stride), dtype)
        for s, part in parts:
            # The mode in which `take` needs no buffer; no row is outside.
            self._tokens[s].rows.take(rows[part], axis=0, out=found[part], mode="clip")
        places = np.empty_like(order)
        places[order] = np.arange(len(ids))
        return found.reshape(len(ids), width).take(places, axis=0)

    def chunk_to_doc(self, chunk_ids: ArrayLike) -> NDArray[np.int64]:
        """Document number of each chunk id [N]."""
        ids = np.asarray(chunk_ids, np.int64)
        out = np.empty(len(ids), np.int64)
        order, local, parts = self._by_shard(ids, self._chunk_base)
        for s, part in parts:
            documents = self.shard(s)[0].chunk_to_doc(local[part])
            out[order[part]] = documents + self._document_base[s]
        return out

    @cached_property
    def documents(self) -> NDArray[np.void]:
        """[num_documents] the document tables of all shards, DOCUMENT_DTYPE (52 bytes each)."""
        return np.concatenate([np.empty(0, DOCUMENT_DTYPE), *self._document_tables()])

    def _document_tables(self) -> list[NDArray[np.void]]:
        return [self.shard(i)[1] for i in range(len(self.manifest.shards))]

    @cached_property
    def document_keys(self) -> NDArray[np.uint64]:
        """[num_documents] first 64 bits of the content hash: equal text has equal keys in any
        dataset.
        """
        parts = [documents["content_hash"][:, 0] for documents in self._document_tables()]
        return np.concatenate([np.empty(0, np.uint64), *parts])

    @cached_property
    def document_clusters(self) -> NDArray[np.uint64]:
        """[num_documents] cluster of near-duplicates that each document belongs to; a document
        without any is a cluster of its own, named by its key."""
        parts = [documents["cluster"] for documents in self._document_tables()]
        return np.concatenate([np.empty(0, np.uint64), *parts])

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
        order, local, parts = self._by_shard(ids.ravel(), self._chunk_base)
        for s, part in parts:
            where, (reader, documents) = order[part], self.shard(s)
            rows = documents[reader.chunk_to_doc(local[part])]
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
        order, local, parts = self._by_shard(ids, self._chunk_base)
        for s, part in parts:
            out[order[part]] = self._column("chunk_bytes", s)[local[part]]
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
        order, local, parts = self._by_shard(ids, self._chunk_base)
        found = [(order[part], self._column("encoder", s)[local[part]]) for s, part in parts]
        width = max((rows.shape[1] for _, rows in found), default=0)
        out = np.full((len(ids), width), self.manifest.encoder.pad_id, np.int32)
        for where, rows in found:
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


def check_no_leak(
    held_out: Dataset, retrieval: Dataset, documents: tuple[int, int] | None = None
) -> None:
    """Refuses a retrieval dataset that holds documents, or near-duplicates, of a held-out dataset,
    or of those documents (first, stop) of any dataset.

    Raises:
        StorageError: with the number of shared documents and one of them.
    """
    if held_out.manifest.split not in HELD_OUT and documents is None:
        return
    part = slice(*documents) if documents else slice(None)
    shared = np.isin(retrieval.document_keys, held_out.document_keys[part])
    shared |= np.isin(retrieval.document_clusters, held_out.document_clusters[part])
    if shared.any():
        row = retrieval.documents[int(np.flatnonzero(shared)[0])]
        raise StorageError(
            f"{retrieval.url} holds {int(shared.sum())} documents that are held out in "
            f"{held_out.url}, or near-duplicates of them; the first is in "
            f"{retrieval.manifest.sources[row['source']]} at byte {row['offset']}. Prepare both "
            "from one input, or take the documents out"
        )
