"""What proposes candidates: one interface over Faiss indexes, inverted lists, and torch.

Scores are approximate. Where `score_error` bounds by how much, who ranks the candidates again
(`indexing/neighbors.py`) knows when they must hold the true best ones.
"""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from indexing.faiss_index import IndexBuildError, read_index
from indexing.inverted_lists import InvertedLists
from indexing.list_search import search_by_list
from indexing.neighbors import Searcher

ROUNDING = 1e-5
Found = tuple[NDArray[np.float32], NDArray[np.int64]]


class IndexSearcher:
    """A Faiss index of any kind, on the CPU or a GPU."""

    def __init__(self, index: Any, nprobe: int | None = None) -> None:
        self._index = index
        self._parameters = None
        if nprobe is not None:
            self._parameters = faiss.SearchParametersIVF()
            self._parameters.nprobe = nprobe
        self.total: int = index.ntotal
        self.score_error = ROUNDING if _stores_vectors(index) else None

    def search(self, queries: NDArray[np.float32], k: int, skip: range | None = None) -> Found:
        parameters = self._parameters
        if skip is not None and self.score_error is not None:
            make: Any = faiss.SearchParameters
            unwanted = faiss.IDSelectorRange(skip.start, skip.stop)
            parameters = make(sel=faiss.IDSelectorNot(unwanted))
        scores, ids = self._index.search(np.ascontiguousarray(queries), k, params=parameters)
        return _as_products(self._index.metric_type, scores, ids), ids


def _stores_vectors(index: Any) -> bool:
    """Exact products of the vectors themselves: a flat inner-product index under a table of ids."""
    inner = faiss.downcast_index(index)
    inner = faiss.downcast_index(inner.index) if isinstance(inner, faiss.IndexIDMap) else inner
    return isinstance(inner, faiss.IndexFlat) and index.metric_type == faiss.METRIC_INNER_PRODUCT


class ListSearcher:
    """A plain IVF index. Which lists a query visits, and what it finds there, does not depend on
    the batch that it is part of."""

    score_error: float | None = None

    def __init__(self, lists: InvertedLists, nprobe: int) -> None:
        self.lists, self.nprobe = lists, min(nprobe, lists.num_lists)
        self.total: int = lists.ivf.ntotal

    def search(self, queries: NDArray[np.float32], k: int, skip: range | None = None) -> Found:
        if self.lists.can_decode:
            return search_by_list(self.lists, queries, self.nprobe, k, skip)
        visited = self.lists.assign(queries, self.nprobe)
        scores, ids = self.lists.search(queries, visited, k)
        return _as_products(self.lists.ivf.metric_type, scores, ids), ids


def _as_products(
    metric: int, scores: NDArray[np.float32], ids: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Scores as inner products of unit vectors; -inf where nothing was found."""
    products = 1 - scores / 2 if metric == faiss.METRIC_L2 else scores
    return np.where(ids < 0, -np.inf, products).astype(np.float32)


def open_searcher(path: Path, nprobe: int | None, device: str) -> Searcher:
    """A searcher over the index in a file. On the CPU the file is mapped: pages that are not
    searched take no memory.

    Raises:
        IndexBuildError: Faiss cannot read it, or device is CUDA and this Faiss has no GPU part.
    """
    index = read_index(path)
    if device != "cpu":
        return IndexSearcher(_on_gpu(index, device), nprobe)
    if nprobe is not None and InvertedLists.are_in(index):
        return ListSearcher(InvertedLists(index), nprobe)
    return IndexSearcher(index, nprobe)


def _on_gpu(index: Any, device: str) -> Any:
    if not hasattr(faiss, "StandardGpuResources"):
        raise IndexBuildError(
            f"device is {device}, but this Faiss has no GPU part; install faiss-gpu instead of "
            "faiss-cpu (never both), search on the CPU, or use faiss_factory Flat, which torch "
            "searches on the GPU"
        )
    number = int(device.partition(":")[2] or 0)
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), number, index)
