"""Readers of neighbors for evaluation: the map's own, controls in their place, and parts of them.

Each reads the same chunks with other neighbors, so that losses differ by the neighbors alone. All
choose from the rows of one KNN map; none searches. Used by `jobs/evaluate.py`.
"""

from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etl.dataset import Dataset
from indexing.knn_map import NO_NEIGHBOR, KNNMap, first_allowed
from model.sampler import mix64
from model.samples import NeighborReader, documents_of

NAMES = ("on", "off", "random", "shuffled", "oracle", "n_only", "f_only")
K_VALUES = (1, 2, 4, 8, 16)
FRACTIONS = (0.01, 0.1, 0.5, 1.0)
DEFAULT = (
    *NAMES,
    *(f"k={k}" for k in K_VALUES),
    *(f"database={fraction:g}" for fraction in FRACTIONS),
)
_K, _DATABASE = "k=", "database="


class ConditionError(ValueError):
    """A condition that does not exist, or that the map cannot serve."""


def open_condition(
    name: str, dataset: Dataset, knn_map: KNNMap, retrieval: Dataset, neighbors: int
) -> NeighborReader | None:
    """The reader of a condition; None is retrieval off.

    on: the map's neighbors. random: random chunks of the database. shuffled: the neighbors of
    another chunk of the same dataset. oracle: the chunk itself and its true continuation, as the
    only neighbor; a control that no retrieval can reach. n_only, f_only: the map's neighbors
    without their continuation, or nothing but it. k=N: N neighbors instead of `neighbors`.
    database=F: a share F of the database's documents; what remains of the map's rows is exactly
    what a search of that database would have found, as far as the rows reach (MassiveDS, arXiv
    2407.12854, section 4.1). A database that holds nothing is retrieval off.

    Raises:
        ConditionError: another name, or more neighbors than the map holds.
    """
    if name == "off":
        return None
    if name.startswith(_K):
        return NeighborReader(knn_map, retrieval, _number(name, _K, 1, knn_map.k, int))
    if name.startswith(_DATABASE):
        fraction = _number(name, _DATABASE, 0, 1, float)
        if fraction * retrieval.num_documents < 1:
            return None
        return FractionReader(knn_map, retrieval, neighbors, fraction)
    if name == "oracle":
        return OracleReader(dataset, knn_map, retrieval, neighbors)
    if name == "shuffled":
        return ShuffledReader(dataset, knn_map, retrieval, neighbors)
    if name in ("n_only", "f_only"):
        return HalfReader(knn_map, retrieval, neighbors, name == "f_only")
    if name in ("on", "random"):
        kind = NeighborReader if name == "on" else RandomNeighborReader
        return kind(knn_map, retrieval, neighbors)
    raise ConditionError(
        f"there is no condition {name!r}; expected one of {', '.join(NAMES)}, {_K}N or {_DATABASE}F"
    )


def possible(name: str, knn_map: KNNMap) -> bool:
    """Whether the map's rows are long enough for a condition."""
    return not name.startswith(_K) or _number(name, _K, 1, inf, int) <= knn_map.k


def same_as(name: str, neighbors: int) -> str:
    """The condition that measures the same: on for k=N and database=1, off for an empty one."""
    if name == f"{_K}{neighbors}":
        return "on"
    if name.startswith(_DATABASE):
        share = _number(name, _DATABASE, 0, 1, float)
        return {0.0: "off", 1.0: "on"}.get(share, name)
    return name


def _number(name: str, prefix: str, least: float, most: float, kind: type) -> Any:
    try:
        value = kind(name.removeprefix(prefix))
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        raise ConditionError(
            f"condition {name!r}: expected {prefix} and a number from {least} to {most}"
        )
    return value


class RandomNeighborReader(NeighborReader):
    """Random chunks of other documents in place of the map's, as many of them."""

    def candidates(self, chunk_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        rows = super().candidates(chunk_ids)
        places = (chunk_ids[..., None] * rows.shape[-1] + np.arange(rows.shape[-1])).astype(
            np.uint64
        )
        random = (mix64(places + np.uint64(1)) % np.uint64(self.retrieval.num_chunks)).astype(
            np.int64
        )
        return np.where(rows >= 0, random, NO_NEIGHBOR)


class ShuffledReader(NeighborReader):
    """Neighbors of another chunk that has some: real neighbors, of the wrong text."""

    def __init__(
        self, dataset: Dataset, knn_map: KNNMap, retrieval: Dataset, neighbors: int
    ) -> None:
        super().__init__(knn_map, retrieval, neighbors)
        order = np.argsort(mix64(np.arange(dataset.num_chunks).astype(np.uint64)))
        order = order[knn_map.get(order)[:, 0] != NO_NEIGHBOR]
        self._other = np.arange(dataset.num_chunks)
        self._other[order] = np.roll(order, 1)

    def candidates(self, chunk_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return super().candidates(self._other[chunk_ids])


class FractionReader(NeighborReader):
    """Neighbors from a share of the database's documents, drawn by the hash of their text, so that
    a smaller share is part of a larger one."""

    def __init__(
        self, knn_map: KNNMap, retrieval: Dataset, neighbors: int, fraction: float
    ) -> None:
        super().__init__(knn_map, retrieval, neighbors)
        draw = mix64(retrieval.document_keys) / float(1 << 64)
        self._is_missing = draw >= fraction

    def candidates(self, chunk_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        rows = super().candidates(chunk_ids)
        missing = self._is_missing[documents_of(self.retrieval, np.maximum(rows, 0))] | (rows < 0)
        return first_allowed(rows, missing, rows.shape[-1])


class HalfReader(NeighborReader):
    """Neighbors of which only the chunk, or only the continuation, can be seen."""

    def __init__(
        self, knn_map: KNNMap, retrieval: Dataset, neighbors: int, continuation: bool
    ) -> None:
        super().__init__(knn_map, retrieval, neighbors)
        self._continuation = continuation

    def tokens_of(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        tokens, mask = super().tokens_of(ids)
        half = self.retrieval.chunk_size
        mask[..., slice(half) if self._continuation else slice(half, None)] = False
        return tokens, mask


class OracleReader(NeighborReader):
    """The chunk and the one that follows it in its document, as the first neighbor; no others."""

    def __init__(
        self, dataset: Dataset, knn_map: KNNMap, retrieval: Dataset, neighbors: int
    ) -> None:
        super().__init__(knn_map, retrieval, neighbors)
        self.dataset = dataset

    def read(
        self, chunk_ids: NDArray[np.int64], present: NDArray[np.bool_], keys: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        dataset, (m, pad) = self.dataset, (self.dataset.chunk_size, self.retrieval.manifest.pad_id)
        following = np.minimum(chunk_ids + 1, dataset.num_chunks - 1)
        goes_on = documents_of(dataset, following) == documents_of(dataset, chunk_ids)
        goes_on &= following > chunk_ids
        pair = np.stack([chunk_ids, following], axis=-1)
        found = dataset.get_chunk(pair.ravel()).reshape(*chunk_ids.shape, 2 * m).astype(np.int32)
        found[~present] = pad
        found[..., m:][~goes_on] = pad
        tokens = np.full((*chunk_ids.shape, self.neighbors, 2 * m), pad, np.int32)
        tokens[..., 0, :] = found
        return tokens, tokens != pad


def short_rows(reader: NeighborReader, chunk_ids: NDArray[np.int64], block: int = 1 << 14) -> float:
    """Share of chunks [N] with neighbors in the map for which a reader has fewer than it is to
    give: with database=F these rows are not exact."""
    short = total = 0
    for start in range(0, len(chunk_ids), block):
        ids = chunk_ids[start : start + block]
        has_any = reader.map.get(ids)[:, 0] != NO_NEIGHBOR
        found = (reader.candidates(ids) != NO_NEIGHBOR).sum(axis=1)
        short += int((has_any & (found < reader.neighbors)).sum())
        total += int(has_any.sum())
    return short / max(1, total)


def names_of(conditions: Sequence[str], knn_map: KNNMap | None) -> tuple[list[str], list[str]]:
    """(measured, impossible): without a map only off can be measured; k=N is impossible beyond the
    map's width."""
    names = list(dict.fromkeys(conditions))
    if knn_map is None:
        return ["off"], []
    return (
        [name for name in names if possible(name, knn_map)],
        [name for name in names if not possible(name, knn_map)],
    )
