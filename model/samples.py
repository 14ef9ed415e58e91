"""Training samples: consecutive tokens of a dataset with the neighbors of every chunk.

Sample j = tokens [j S, j S + S] of the dataset's token stream, documents packed with their pads.
The KNN map is keyed by chunk, so it serves any sequence length, order or batch.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from etl.dataset import Dataset, check_no_leak
from indexing.knn_manifest import BuiltMap
from indexing.knn_map import NO_NEIGHBOR, KNNMap
from model.sampler import mix64


class SampleError(ValueError):
    """Datasets and options that give no samples."""


@dataclass(frozen=True)
class Batch:
    """B samples of S tokens. C = S // chunk_size chunks, K neighbors, R = 2 chunk_size.

    loss_mask is on labels: a text or end-of-document token of the same document as its input token.
    neighbors and neighbors_mask are None without retrieval. A missing neighbor is all pads, masked.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    tokens_mask: NDArray[np.bool_]
    loss_mask: NDArray[np.bool_]
    neighbors: NDArray[np.int64] | None = None
    neighbors_mask: NDArray[np.bool_] | None = None

    def to(self, device: torch.device | str) -> "TensorBatch":
        def moved(array: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        return TensorBatch(
            moved(self.tokens),
            moved(self.labels),
            moved(self.tokens_mask),
            moved(self.loss_mask),
            None if self.neighbors is None else moved(self.neighbors),
            None if self.neighbors_mask is None else moved(self.neighbors_mask),
        )


@dataclass(frozen=True)
class TensorBatch:
    """A Batch on a device; same fields and shapes."""

    tokens: torch.Tensor
    labels: torch.Tensor
    tokens_mask: torch.Tensor
    loss_mask: torch.Tensor
    neighbors: torch.Tensor | None
    neighbors_mask: torch.Tensor | None


def only_copies(batch: Batch) -> Batch:
    """The same batch, counting only labels that stand in a neighbor their position can attend to:
    one of the last completed chunk."""
    assert batch.neighbors is not None
    assert batch.neighbors_mask is not None
    size, chunks, chunk_size = *batch.neighbors.shape[:2], batch.neighbors.shape[-1] // 2
    held = np.zeros_like(batch.loss_mask)
    found = np.where(batch.neighbors_mask, batch.neighbors, -1).reshape(size, chunks, -1)
    for b, u in np.ndindex(size, chunks):
        places = slice(chunk_size * (u + 1) - 1, chunk_size * (u + 2) - 1)
        held[b, places] = np.isin(batch.labels[b, places], found[b, u])
    return replace(batch, loss_mask=batch.loss_mask & held)


class SampleReader:
    """Assembles batches. `retrieval` None gives samples without neighbors.

    Raises:
        SampleError: seq_length is not a multiple of chunk_size, the dataset is a retrieval dataset,
            or the map holds fewer neighbors than asked for.
        StorageError: the map was made for other datasets.
    """

    def __init__(
        self, dataset: Dataset, seq_length: int, retrieval: "NeighborReader | None" = None
    ) -> None:
        if seq_length < 1 or seq_length % dataset.chunk_size:
            raise SampleError(
                f"seq_length {seq_length} is not a multiple of chunk_size {dataset.chunk_size}"
            )
        if dataset.manifest.split == "retrieval":
            raise SampleError(
                f"{dataset.url} is a retrieval dataset; samples come from train, validation or test"
            )
        if dataset.num_chunks == 0:
            raise SampleError(f"{dataset.url} is empty")
        self.dataset, self.seq_length, self.retrieval = dataset, seq_length, retrieval
        self.num_tokens = dataset.num_chunks * dataset.chunk_size
        self.num_samples = max(1, -(-(self.num_tokens - 1) // seq_length))

    @property
    def neighbors(self) -> int:
        """Neighbors of each chunk; 0 without retrieval."""
        return self.retrieval.neighbors if self.retrieval is not None else 0

    def read(self, samples: ArrayLike) -> Batch:
        """The samples with these numbers [B]; the last one of the dataset is padded."""
        chunk_ids, inside = self.chunk_ids(samples)
        pad = self.dataset.manifest.pad_id
        flat = np.minimum(chunk_ids, self.dataset.num_chunks - 1).ravel()
        chunks = self.dataset.get_chunk(flat).astype(np.int64).reshape(*chunk_ids.shape, -1)
        stream = np.where(inside[..., None], chunks, pad).reshape(len(chunk_ids), -1)[
            :, : self.seq_length + 1
        ]
        documents = np.repeat(
            self.dataset.chunk_to_doc(flat).reshape(chunk_ids.shape),
            self.dataset.chunk_size,
            axis=1,
        )
        tokens, labels = stream[:, :-1], stream[:, 1:]
        same_document = documents[:, : self.seq_length] == documents[:, 1 : self.seq_length + 1]
        batch = Batch(
            tokens=np.ascontiguousarray(tokens),
            labels=np.ascontiguousarray(labels),
            tokens_mask=tokens != pad,
            loss_mask=(tokens != pad) & (labels != pad) & same_document,
        )
        return batch if self.retrieval is None else self._with_neighbors(batch, chunk_ids, inside)

    def chunk_ids(self, samples: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """[B, S / chunk_size + 1] the chunks that hold a sample's tokens and last label, and which
        of them exist."""
        per_sample = self.seq_length // self.dataset.chunk_size
        first = np.asarray(samples, np.int64)[:, None] * per_sample
        ids = first + np.arange(per_sample + 1)
        return ids, ids < self.dataset.num_chunks

    def _with_neighbors(
        self, batch: Batch, chunk_ids: NDArray[np.int64], inside: NDArray[np.bool_]
    ) -> Batch:
        assert self.retrieval is not None
        rows, present = chunk_ids[:, :-1], inside[:, :-1]
        safe = np.where(present, rows, 0)
        keys = self.dataset.chunk_keys(safe)
        neighbors, mask = self.retrieval.read(safe, present, keys)
        return Batch(
            batch.tokens, batch.labels, batch.tokens_mask, batch.loss_mask, neighbors, mask
        )


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
        """[B, C, K] neighbor ids of chunks [B, C] whose documents have `keys` [B, C, 2].

        Every document of the sample and its cluster is banned; the first K others of the row are
        taken; -1 where they run out.
        """
        rows = self.candidates(chunk_ids)
        missing = (rows < 0) | ~present[..., None]
        found = self.retrieval.chunk_keys(np.where(missing, 0, rows))
        same = [np.isin(f, k).any(axis=-1) for f, k in zip(found, keys, strict=True)]
        banned = missing | np.stack(same)
        order = np.argsort(banned, axis=-1, kind="stable")[..., : self.neighbors]
        return np.take_along_axis(np.where(banned, NO_NEIGHBOR, rows), order, axis=-1)

    def read(
        self, chunk_ids: NDArray[np.int64], present: NDArray[np.bool_], keys: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens [B, C, K, R] and mask of the chosen neighbors."""
        return self.tokens_of(self.choose(chunk_ids, present, keys))

    def tokens_of(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens [..., R] and mask of neighbor ids [...]; an id of -1 gives pads."""
        pad = self.retrieval.manifest.pad_id
        chunks = (
            self.retrieval.get_chunk(np.maximum(ids, 0).ravel())
            .astype(np.int64)
            .reshape(*ids.shape, -1)
        )
        tokens = np.where(ids[..., None] >= 0, chunks, pad)
        return tokens, tokens != pad


class RandomNeighborReader(NeighborReader):
    """The control for evaluation: random chunks of other documents in place of the map's, as many
    of them."""

    def candidates(self, chunk_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        rows = super().candidates(chunk_ids)
        places = (chunk_ids[..., None] * rows.shape[-1] + np.arange(rows.shape[-1])).astype(
            np.uint64
        )
        random = (mix64(places + np.uint64(1)) % np.uint64(self.retrieval.num_chunks)).astype(
            np.int64
        )
        return np.where(rows >= 0, random, NO_NEIGHBOR)
