"""The inverted lists of a Faiss IVF index: which of them a vector belongs to, exactly, and what
they hold.

Faiss chooses lists by float products, whose last bits depend on how many vectors are multiplied at
a time. Here vectors are rounded to multiples of 2^-11 first: products of two are then integers (of
2^-22) below 2^24, which float32 holds exactly, so the choice is the same in any batch, on any
machine.
"""

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

UNIT = 2.0**11
_ASSIGNED_CELLS = 1 << 24


def in_units(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Integers, vectors of length 1 as multiples of 2^-11."""
    return np.rint(vectors * np.float32(UNIT))


class InvertedLists:
    """A plain IVF index (nothing before it transforms vectors). Keeps `index`, which owns them."""

    def __init__(self, index: Any) -> None:
        self.index = index
        self.ivf: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
        self.num_lists: int = self.ivf.nlist
        quantizer: Any = faiss.downcast_index(self.ivf.quantizer)
        self._is_flat = isinstance(quantizer, faiss.IndexFlat)
        self.centroids: NDArray[np.float32] | None = None
        if self._is_flat:
            centroids = quantizer.reconstruct_n(0, self.num_lists)
            self.centroids, units = centroids, in_units(centroids)
            self._units = np.ascontiguousarray(units.T)
            # |q - c|^2 is least where 2 q.c - |c|^2 is greatest.
            is_l2 = self.ivf.metric_type == faiss.METRIC_L2
            norms = (units.astype(np.int64) ** 2).sum(axis=1)
            self._penalty = norms if is_l2 else np.zeros_like(norms)

    @staticmethod
    def are_in(index: Any) -> bool:
        """Whether the index is of the kind that this class reads."""
        return isinstance(faiss.downcast_index(index), faiss.IndexIVF)

    @property
    def can_decode(self) -> bool:
        """Whether `read` can give back the vectors that the codes stand for."""
        kinds = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)
        return isinstance(self.ivf, kinds)

    def assign(self, vectors: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        """[N, count] the lists nearest to vectors [N, D], nearest first; ties by list number."""
        count = min(count, self.num_lists)
        if not self._is_flat:
            return self.ivf.quantizer.search(np.ascontiguousarray(vectors), count)[1]
        step = max(1, _ASSIGNED_CELLS // self.num_lists)
        parts = [
            self._nearest(vectors[start : start + step], count)
            for start in range(0, len(vectors), step)
        ]
        return np.concatenate([np.empty((0, count), np.int64), *parts])

    def _nearest(self, vectors: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        products = (in_units(vectors) @ self._units).astype(np.int64)
        keys = (2 * products - self._penalty) * self.num_lists
        keys += np.arange(self.num_lists - 1, -1, -1)
        lists = np.argpartition(keys, self.num_lists - count, axis=1)[:, self.num_lists - count :]
        order = np.argsort(-np.take_along_axis(keys, lists, 1), axis=1)
        return np.take_along_axis(lists, order, 1)

    def _coarse_scores(
        self, vectors: NDArray[np.float32], lists: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """[N, M] what Faiss expects beside lists [N, M]: product with, or squared distance to, the
        centroid."""
        if self.centroids is None:
            return self.ivf.quantizer.search(np.ascontiguousarray(vectors), lists.shape[1])[0]
        chosen = self.centroids[lists]
        if self.ivf.metric_type == faiss.METRIC_L2:
            return ((chosen - vectors[:, None]) ** 2).sum(axis=2)
        return np.einsum("nd,nmd->nm", vectors, chosen)

    def add(self, vectors: NDArray[np.float32], ids: NDArray[np.int64]) -> None:
        """Adds vectors [N, D] under ids [N]."""
        vectors, ids = np.ascontiguousarray(vectors), np.ascontiguousarray(ids)
        lists = self.assign(vectors, 1).ravel()
        self.ivf.add_core(len(vectors), *(faiss.swig_ptr(a) for a in (vectors, ids, lists)))

    def search(
        self, queries: NDArray[np.float32], lists: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Faiss's own (scores, ids), both [N, k], of queries [N, D] in lists [N, M]."""
        queries = np.ascontiguousarray(queries)
        self.ivf.nprobe = lists.shape[1]
        return self.ivf.search_preassigned(queries, k, lists, self._coarse_scores(queries, lists))

    def read(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(ids [L], decoded vectors [L, D]) of a list."""
        lists, length = self.ivf.invlists, self.ivf.invlists.list_size(number)
        if length == 0:
            return np.empty(0, np.int64), np.empty((0, self.ivf.d), np.float32)
        held_ids, held_codes = lists.get_ids(number), lists.get_codes(number)
        try:
            ids = faiss.rev_swig_ptr(held_ids, length).copy()
            vectors = np.empty((length, self.ivf.d), np.float32)
            owners = np.full(length, number, np.int64)
            places = (faiss.swig_ptr(owners), faiss.swig_ptr(vectors))
            self.ivf.decode_vectors(length, held_codes, *places)
        finally:
            lists.release_ids(number, held_ids)
            lists.release_codes(number, held_codes)
        return ids, vectors
