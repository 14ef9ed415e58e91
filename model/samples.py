"""Training samples: consecutive tokens of a dataset with the neighbors of every chunk.

Sample j = tokens [j S, j S + S] of the dataset's token stream, documents packed with their pads; or
of the stream of some of its documents. Batches are gathered without a loop over samples or chunks.
The KNN map is keyed by chunk, so it serves any sequence length, order or batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import inf
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from etl.dataset import Dataset, check_no_leak
from indexing.knn_manifest import BuiltMap
from indexing.knn_map import NO_NEIGHBOR, KNNMap, first_allowed

T = TypeVar("T")


class SampleError(ValueError):
    """Datasets and options that give no samples."""


@dataclass(frozen=True)
class Batch:
    """B samples of S tokens. C = S // chunk_size chunks, K neighbors, R = 2 chunk_size.

    loss_mask is on labels: a text or end-of-document token of the same document as its input token.
    neighbors and neighbors_mask are None without retrieval. A missing neighbor is all pads, masked.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int64]
    tokens_mask: NDArray[np.bool_]
    loss_mask: NDArray[np.bool_]
    neighbors: NDArray[np.int32] | None = None
    neighbors_mask: NDArray[np.bool_] | None = None

    @classmethod
    def of(
        cls,
        stream: NDArray[Any],
        pad_id: int,
        breaks: tuple[NDArray[np.intp], NDArray[np.intp]],
        neighbors: tuple[NDArray[np.int32], NDArray[np.bool_]] | None,
    ) -> Self:
        """Of tokens with their last label [B, S + 1] and neighbors with their mask; `breaks` are
        the places, in [B, S], of the labels that begin another document than their input token's.
        """
        is_text = stream != pad_id
        loss_mask = is_text[:, :-1] & is_text[:, 1:]
        loss_mask[breaks] = False
        return cls(
            stream[:, :-1].astype(np.int32),
            stream[:, 1:].astype(np.int64),
            np.ascontiguousarray(is_text[:, :-1]),
            loss_mask,
            *(neighbors or (None, None)),
        )

    def split(self, size: int) -> "list[Batch]":
        """Batches of `size` samples (views)."""
        parts = range(0, len(self.tokens), size)
        return [self._each(lambda array, i=i: array[i : i + size], Batch) for i in parts]

    def to(self, device: torch.device | str) -> "TensorBatch":
        """Copied to a GPU while the host goes on."""
        device = torch.device(device)

        def moved(array: NDArray[Any]) -> torch.Tensor:
            tensor = torch.from_numpy(array)
            if device.type == "cpu":
                return tensor
            return tensor.pin_memory().to(device, non_blocking=True)

        return self._each(moved, TensorBatch)

    def _each(self, change: Callable[[NDArray[Any]], Any], kind: type[T]) -> T:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return kind(**{k: None if v is None else change(v) for k, v in values.items()})


@dataclass(frozen=True)
class TensorBatch:
    """A Batch on a device; same fields and shapes."""

    tokens: torch.Tensor
    labels: torch.Tensor
    tokens_mask: torch.Tensor
    loss_mask: torch.Tensor
    neighbors: torch.Tensor | None
    neighbors_mask: torch.Tensor | None


def split_documents(
    splits_string: str, num_documents: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(first, stop) document numbers of the train, validation and test parts of a dataset, as NeMo
    cuts them.

    Args:
        splits_string: Three weights with commas or slashes between them, of any sum: "980,10,10".

    Raises:
        SampleError: not three weights, a negative one, or none above zero.
    """
    try:
        weights = [float(weight) for weight in splits_string.replace("/", ",").split(",")]
    except ValueError:
        weights = []
    total = sum(weights)
    if len(weights) != 3 or min(weights) < 0 or not 0 < total < inf:
        raise SampleError(
            f"splits_string is {splits_string!r}; expected three weights from 0 up that are not "
            'all 0, like "980,10,10"'
        )
    bounds = [0]
    for weight in weights:
        bounds.append(bounds[-1] + round(weight / total * num_documents))
    surplus = bounds[3] - num_documents
    b1, b2, b3 = (max(0, bound - surplus) for bound in bounds[1:])
    return (0, b1), (b1, b2), (b2, b3)


def documents_of(dataset: Dataset, chunk_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Document number of each chunk id, same shape, by the table of the whole dataset: sooner than
    shard by shard where chunks come from everywhere, and sooner in ascending order.

    Raises:
        IndexError: an id that the dataset does not hold.
    """
    order = chunk_ids.argsort(axis=None)
    ascending = chunk_ids.ravel()[order]
    if ascending.size and (ascending[0] < 0 or ascending[-1] >= dataset.num_chunks):
        raise IndexError(
            f"{dataset.url}: chunk ids {ascending[0]}..{ascending[-1]}; the dataset holds "
            f"0..{dataset.num_chunks - 1}"
        )
    out = np.empty_like(ascending)
    out[order] = dataset.document_first_chunk.searchsorted(ascending, side="right") - 1
    return out.reshape(chunk_ids.shape)


class Samples(Protocol):
    """Numbered samples."""

    @property
    def seq_length(self) -> int: ...
    @property
    def num_samples(self) -> int: ...
    def read(self, samples: ArrayLike) -> Batch: ...


class SampleReader:
    """Assembles batches. `retrieval` None gives samples without neighbors.

    Args:
        documents: (first, stop) document numbers that samples are made of; all by default.
        stride: Tokens from the start of a sample to that of the next; by default seq_length.

    Raises:
        SampleError: seq_length or stride is not a multiple of chunk_size, or stride is larger, the
            dataset is a retrieval dataset, the documents are none or not in it, or the map holds
            fewer neighbors than asked for.
        StorageError: the map was made for other datasets.
    """

    def __init__(
        self,
        dataset: Dataset,
        seq_length: int,
        retrieval: "NeighborReader | None" = None,
        documents: tuple[int, int] | None = None,
        stride: int | None = None,
    ) -> None:
        stride = seq_length if stride is None else stride
        if (
            not 0 < stride <= seq_length
            or seq_length % dataset.chunk_size
            or (stride % dataset.chunk_size)
        ):
            raise SampleError(
                f"seq_length is {seq_length} and stride {stride}; expected multiples of chunk_size "
                f"{dataset.chunk_size}, stride no more than seq_length"
            )
        if dataset.manifest.split == "retrieval":
            raise SampleError(
                f"{dataset.url} is a retrieval dataset; samples come from train, validation or test"
            )
        self.dataset, self.seq_length, self.retrieval = dataset, seq_length, retrieval
        self.stride = stride
        self._first_chunk, self._stop_chunk = self._chunks_of(documents)
        self.num_tokens = (self._stop_chunk - self._first_chunk) * dataset.chunk_size
        self.num_samples = max(1, 1 - (seq_length - self.num_tokens + 1) // stride)

    def _chunks_of(self, documents: tuple[int, int] | None) -> tuple[int, int]:
        dataset = self.dataset
        if documents is None:
            if dataset.num_chunks == 0:
                raise SampleError(f"{dataset.url} is empty")
            return 0, dataset.num_chunks
        first, stop = documents
        if not 0 <= first < stop <= dataset.num_documents:
            raise SampleError(
                f"{dataset.url}: documents {first} to {stop}; expected at least one of the "
                f"{dataset.num_documents} there are"
            )
        firsts = dataset.document_first_chunk
        return int(firsts[first]), int(firsts[stop])

    @property
    def first_token(self) -> int:
        """Place of the first sample's first token in the dataset's token stream."""
        return self._first_chunk * self.dataset.chunk_size

    @property
    def neighbors(self) -> int:
        """Neighbors of each chunk; 0 without retrieval."""
        return self.retrieval.neighbors if self.retrieval is not None else 0

    def read(self, samples: ArrayLike) -> Batch:
        """The samples with these numbers [B]; the last one of the documents is padded."""
        chunk_ids, inside = self.chunk_ids(samples)
        existing = np.minimum(chunk_ids, self._stop_chunk - 1)
        stream = self._stream(existing, inside)
        documents, starts = self._documents(existing)
        sample, place = (starts > 0).nonzero()
        breaks = sample, starts[sample, place] * self.dataset.chunk_size - 1
        neighbors = None
        if self.retrieval is not None:
            rows, present, keys = existing[:, :-1], inside[:, :-1], self._keys(documents, starts)
            neighbors = self.retrieval.read(rows, present, keys)
        return Batch.of(stream, self.dataset.manifest.pad_id, breaks, neighbors)

    def chunk_ids(self, samples: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """[B, S / chunk_size + 1] the chunks that hold a sample's tokens and last label, and which
        of them exist."""
        per_sample = self.seq_length // self.dataset.chunk_size
        distance = self.stride // self.dataset.chunk_size
        first = self._first_chunk + np.asarray(samples, np.int64)[:, None] * distance
        ids = first + np.arange(per_sample + 1)
        return ids, ids < self._stop_chunk

    def _stream(self, chunk_ids: NDArray[np.int64], inside: NDArray[np.bool_]) -> NDArray[Any]:
        """[B, S + 1] the tokens of chunks [B, C + 1] up to the last label, in the file's dtype;
        those of chunks that are not inside are pads."""
        chunks = self.dataset.get_chunk(chunk_ids.ravel()).reshape(*chunk_ids.shape, -1)
        chunks[~inside] = self.dataset.manifest.pad_id
        return chunks.reshape(len(chunk_ids), -1)[:, : self.seq_length + 1]

    def _documents(
        self, chunk_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[B, D] the documents of chunks [B, C + 1], consecutive ones, the last repeated where a
        sample has fewer; and [B, D] at which chunk of the sample each starts, 0 or less for the
        first."""
        first, last = documents_of(self.dataset, chunk_ids[:, [0, -1]]).T[:, :, None]
        places = np.arange((last - first).max(initial=0) + 1)
        documents = np.minimum(first + places, last)
        return documents, self.dataset.document_first_chunk[documents] - chunk_ids[:, :1]

    def _keys(self, documents: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.uint64]:
        """[B, D, 2] keys and clusters of the documents that a sample has tokens of; one that starts
        with its last label gives way to the first."""
        num_chunks = self.seq_length // self.dataset.chunk_size
        own = np.where(starts < num_chunks, documents, documents[:, :1])
        dataset = self.dataset
        return np.stack([dataset.document_keys[own], dataset.document_clusters[own]], axis=-1)


class NeighborReader:
    """The neighbors of a dataset's chunks: ids from the KNN map, tokens from the retrieval
    dataset."""

    def __init__(self, knn_map: KNNMap, retrieval: Dataset, neighbors: int) -> None:
        if not 1 <= neighbors <= knn_map.k:
            raise SampleError(f"neighbors is {neighbors}; the KNN map holds {knn_map.k} a chunk")
        self.map, self.retrieval, self.neighbors = knn_map, retrieval, neighbors

    @classmethod
    def open(
        cls, dataset: Dataset, built_map: BuiltMap, retrieval: Dataset, neighbors: int
    ) -> Self:
        """The neighbors that a finished map holds for a dataset's chunks.

        Raises:
            StorageError: the map was made for other datasets, or held-out documents are in the
                retrieval dataset.
        """
        built_map.check_parents(dataset, retrieval)
        check_no_leak(dataset, retrieval)
        return cls(built_map.load(), retrieval, neighbors)

    def candidates(self, chunk_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B, C, k] ids to choose from, best first."""
        return self.map.get(chunk_ids)

    def choose(
        self, chunk_ids: NDArray[np.int64], present: NDArray[np.bool_], keys: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        """[B, C, K] neighbor ids of chunks [B, C] whose samples' documents have `keys` [B, D, 2].

        Every document of the sample and its cluster is banned; the first K others of the row are
        taken; -1 where they run out.
        """
        rows = self.candidates(chunk_ids)
        rows[~present] = NO_NEIGHBOR
        chosen = rows[..., : self.neighbors].copy()
        # Few rows begin with a banned neighbor: only these are looked at as a whole.
        sample, chunk = self._is_banned(chosen, keys).nonzero()[:2]
        if len(sample):
            rows = rows[sample, chunk]
            banned = self._is_banned(rows, keys[sample])
            chosen[sample, chunk] = first_allowed(rows, banned, self.neighbors)
        return chosen

    def _is_banned(self, ids: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """[N, ...] whether each id of ids [N, ...] is missing, or its document's key or cluster is
        one of the numbers in keys [N, D, 2]."""
        retrieval, (count, num_keys) = self.retrieval, (len(ids), keys[0].size)
        documents = documents_of(retrieval, np.maximum(ids, 0)).reshape(count, -1)
        held = keys.reshape(count, num_keys, 1).swapaxes(0, 1)
        same = (retrieval.document_keys[documents] == held).any(axis=0)
        same |= (retrieval.document_clusters[documents] == held).any(axis=0)
        return (ids < 0) | same.reshape(ids.shape)

    def read(
        self, chunk_ids: NDArray[np.int64], present: NDArray[np.bool_], keys: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokens [B, C, K, R] and mask of the chosen neighbors."""
        return self.tokens_of(self.choose(chunk_ids, present, keys))

    def tokens_of(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokens [..., R] and mask of neighbor ids [...]; an id of -1 gives pads."""
        pad = self.retrieval.manifest.pad_id
        tokens = self.retrieval.get_chunk(np.maximum(ids, 0).ravel()).reshape(*ids.shape, -1)
        tokens[ids < 0] = pad
        return tokens.astype(np.int32), tokens != pad
