"""Faiss: which index for how many vectors, training, adding shards, merging, searching. CPU Faiss.

All vectors have unit length, so inner product is the cosine similarity. faiss is imported at the
top: only modules that search may import this one.
"""

from math import sqrt
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from indexing.embeddings import Embeddings

EXACT_VECTORS = 200_000
DEFAULT_NPROBE = 32


class IndexBuildError(ValueError):
    """An index that cannot be built or does not fit its vectors."""


def choose_factory(num_vectors: int) -> tuple[str, str]:
    """(factory string, reason): exact search while that is affordable, inverted lists with 8-bit
    codes above."""
    if num_vectors <= EXACT_VECTORS:
        return "Flat", f"{num_vectors} vectors are at most {EXACT_VECTORS}: exact search"
    lists = int(4 * sqrt(num_vectors))
    return (
        f"IVF{lists},SQ8",
        f"{num_vectors} vectors are more than {EXACT_VECTORS}: {lists} inverted lists",
    )


def train_index(
    factory: str, embeddings: Embeddings, train_index_size: int, seed: int
) -> faiss.Index:
    """A trained, empty index that takes explicit int64 ids. The sample is drawn without
    replacement.

    Raises:
        IndexBuildError: an unknown factory string, or too few vectors to train it.
    """
    sample = _training_sample(embeddings, train_index_size, seed)
    try:
        index = faiss.index_factory(
            embeddings.dimension, _with_ids(factory), faiss.METRIC_INNER_PRODUCT
        )
        index.train(sample)
    except RuntimeError as error:
        raise IndexBuildError(
            f"faiss cannot train {factory!r} on {len(sample)} vectors: {error}"
        ) from error
    return index


def _with_ids(factory: str) -> str:
    """Inverted lists store ids themselves; other indexes get a table of them."""
    return factory if "IVF" in factory or factory.startswith("IDMap") else f"IDMap,{factory}"


def _training_sample(embeddings: Embeddings, size: int, seed: int) -> NDArray[np.float32]:
    total = embeddings.num_chunks
    chosen = np.random.default_rng(seed).choice(total, min(size, total), replace=False)
    vectors = embeddings.rows(np.sort(chosen)).astype(np.float32)
    return vectors[np.any(vectors != 0, axis=1)]


def add_rows(index: faiss.Index, embeddings: Embeddings, start: int, stop: int) -> None:
    """Adds the vectors of chunk ids start..stop-1 under these ids; chunks without text are left
    out.

    Raises:
        IndexBuildError: a vector is not finite (Faiss would lose it silently).
    """
    for first, block in embeddings.slices(start, stop):
        vectors = np.ascontiguousarray(block, np.float32)
        if not np.isfinite(vectors).all():
            raise IndexBuildError(
                f"{embeddings.url}: vectors from chunk {first} on are not all finite"
            )
        keep = np.any(vectors != 0, axis=1)
        index.add_with_ids(
            vectors[keep], np.arange(first, first + len(vectors), dtype=np.int64)[keep]
        )


def shard_range(total: int, total_shards: int, shard_id: int) -> tuple[int, int]:
    """NeMo's split of `total` rows: total // total_shards each, the last one takes the rest.

    Raises:
        IndexBuildError: shard_id outside 0..total_shards - 1.
    """
    if not 0 <= shard_id < total_shards:
        raise IndexBuildError(
            f"shard_id {shard_id} of {total_shards} shards; expected 0..{total_shards - 1}"
        )
    size = total // total_shards
    return shard_id * size, total if shard_id == total_shards - 1 else (shard_id + 1) * size


def merge_indexes(indexes: list[faiss.Index]) -> faiss.Index:
    """Appends all vectors to the first index, in order; the same bytes as adding them to one index.

    Raises:
        IndexBuildError: nothing to merge, or indexes that were not trained alike.
    """
    if not indexes:
        raise IndexBuildError("nothing to merge: expected at least one index shard")
    merged, *rest = indexes
    for index in rest:
        try:
            merged.merge_from(index, 0)
        except RuntimeError as error:
            raise IndexBuildError(f"index shards do not fit together: {error}") from error
    return merged


def write_index(index: faiss.Index, path: Path) -> None:
    faiss.write_index(index, str(path))


def read_index(path: Path, nprobe: int | None = None) -> faiss.Index:
    """The index in a file; `nprobe` is for one with inverted lists.

    Raises:
        IndexBuildError: Faiss cannot read the file.
    """
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise IndexBuildError(
            f"{path}: not a Faiss index that this Faiss reads: {error}"
        ) from error
    if nprobe is not None:
        set_nprobe(index, nprobe)
    return index


def set_nprobe(index: faiss.Index, nprobe: int) -> None:
    """How many inverted lists a query visits."""
    faiss.extract_index_ivf(index).nprobe = nprobe


def has_lists(index: faiss.Index) -> bool:
    """Whether the index has inverted lists, so that nprobe acts on it."""
    return faiss.try_extract_index_ivf(index) is not None


def search_index(
    index: Any, queries: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(scores, ids), both [N, k], best first; id -1 where there are fewer than k."""
    return index.search(np.ascontiguousarray(queries), k)


def exact_search(
    embeddings: Embeddings, queries: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(scores, ids), both [N, k]: exact search over all stored vectors, block by block."""
    best = np.full((len(queries), k), -np.inf, np.float32)
    ids = np.full((len(queries), k), -1, np.int64)
    for first, block in embeddings.slices(0, embeddings.num_chunks):
        vectors = np.ascontiguousarray(block, np.float32)
        keep = np.flatnonzero(np.any(vectors != 0, axis=1))
        if len(keep) == 0:
            continue
        scores, rows = faiss.knn(
            queries, vectors[keep], min(k, len(keep)), faiss.METRIC_INNER_PRODUCT
        )
        scores = np.concatenate([best, scores], axis=1)
        candidates = np.concatenate([ids, keep[rows] + first], axis=1)
        order = np.lexsort((candidates, -scores))[:, :k]
        best, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(candidates, order, 1)
    return best, ids
