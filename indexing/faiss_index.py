"""Faiss: training, adding shards, merging, files.

All vectors have unit length, so inner product is the cosine similarity. faiss is imported at the
top: only modules that build or search may import this one.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from indexing.embeddings import Embeddings
from indexing.inverted_lists import InvertedLists


class IndexBuildError(ValueError):
    """An index that cannot be built or does not fit its vectors."""


METRICS = {"inner_product": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}


def train_index(
    factory: str, metric: str, embeddings: Embeddings, stop: int, train_index_size: int, seed: int
) -> faiss.Index:
    """A trained, empty index that takes explicit int64 ids. The sample is drawn from chunk ids
    0..stop-1 without replacement.

    Raises:
        IndexBuildError: an unknown factory string, one that cannot be built in shards, or too few
            vectors to train it.
    """
    try:
        index = faiss.index_factory(embeddings.dimension, _with_ids(factory), METRICS[metric])
    except RuntimeError as error:
        raise IndexBuildError(f"faiss_factory {factory!r} is not one of Faiss: {error}") from None
    if "HNSW" in factory and not has_lists(index):
        raise IndexBuildError(
            f"faiss_factory {factory!r}: a graph cannot be built in shards; use HNSW as the coarse "
            "quantizer of inverted lists, as in IVF65536_HNSW32,SQ8"
        )
    sample = _training_sample(embeddings, stop, train_index_size, seed)
    lists = num_lists(index)
    if len(sample) < lists:
        raise IndexBuildError(
            f"faiss_factory {factory!r} has {lists} inverted lists, but only {len(sample)} vectors "
            "to train on; use fewer lists, or Flat"
        )
    try:
        index.train(sample)
    except RuntimeError as error:
        raise IndexBuildError(
            f"faiss cannot train {factory!r} on {len(sample)} vectors: {error}"
        ) from error
    return index


def _with_ids(factory: str) -> str:
    """Inverted lists store ids themselves; other indexes get a table of them."""
    return factory if "IVF" in factory or factory.startswith("IDMap") else f"IDMap,{factory}"


def _training_sample(
    embeddings: Embeddings, stop: int, size: int, seed: int
) -> NDArray[np.float32]:
    chosen = np.random.default_rng(seed).choice(stop, min(size, stop), replace=False)
    vectors = embeddings.rows(np.sort(chosen)).astype(np.float32)
    _check_finite(vectors, embeddings, "the training sample")
    return vectors[np.any(vectors != 0, axis=1)]


def _check_finite(vectors: NDArray[np.float32], embeddings: Embeddings, which: str) -> None:
    if not np.isfinite(vectors).all():
        raise IndexBuildError(
            f"{embeddings.url}: the vectors of {which} are not all finite; delete that folder and "
            "embed again"
        )


def add_rows(index: faiss.Index, embeddings: Embeddings, start: int, stop: int) -> None:
    """Adds the vectors of chunk ids start..stop-1 under these ids; chunks without text are left
    out.

    Raises:
        IndexBuildError: a vector is not finite (Faiss would lose it silently).
    """
    lists = InvertedLists(index) if InvertedLists.are_in(index) else None
    for first, block in embeddings.slices(start, stop):
        vectors = np.ascontiguousarray(block, np.float32)
        _check_finite(vectors, embeddings, f"chunk {first} and those after it")
        keep = np.any(vectors != 0, axis=1)
        ids = np.arange(first, first + len(vectors), dtype=np.int64)[keep]
        (index.add_with_ids if lists is None else lists.add)(vectors[keep], ids)


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


def merge_indexes(indexes: Iterable[faiss.Index]) -> faiss.Index:
    """Appends all vectors to the first index, in order; the same bytes as adding them to one index.
    Memory: the merged index and one more at a time.

    Raises:
        IndexBuildError: nothing to merge, or indexes that were not trained alike.
    """
    merged: faiss.Index | None = None
    for index in indexes:
        if merged is None:
            merged = index
            continue
        try:
            merged.merge_from(index, 0)
        except RuntimeError as error:
            raise IndexBuildError(f"index shards do not fit together: {error}") from error
    if merged is None:
        raise IndexBuildError("nothing to merge: expected at least one index shard")
    return merged


def write_index(index: faiss.Index, path: Path) -> None:
    faiss.write_index(index, str(path))


def read_index(path: Path, mapped: bool = True) -> faiss.Index:
    """The index in a file; `mapped` leaves its vectors in the file, to be read as they are visited.

    Raises:
        IndexBuildError: Faiss cannot read the file.
    """
    with open(path, "rb") as file:
        has_lists_first = file.read(2) == b"Iw"
    flags = faiss.IO_FLAG_READ_ONLY
    flags |= faiss.IO_FLAG_MMAP if has_lists_first else faiss.IO_FLAG_MMAP_IFC
    try:
        return faiss.read_index(str(path), flags if mapped else 0)
    except RuntimeError as error:
        raise IndexBuildError(
            f"{path}: not a Faiss index that this Faiss reads: {error}"
        ) from error


def has_lists(index: faiss.Index) -> bool:
    """Whether the index has inverted lists, so that nprobe acts on it."""
    return faiss.try_extract_index_ivf(index) is not None


def num_lists(index: faiss.Index) -> int:
    """How many inverted lists an index has; 0 without."""
    return int(faiss.extract_index_ivf(index).nlist) if has_lists(index) else 0


def lists_in_factory(factory: str) -> int:
    """How many inverted lists a factory string asks for; 0 if it asks for none."""
    found = re.search(r"IVF(\d+)", factory)
    return int(found[1]) if found else 0
