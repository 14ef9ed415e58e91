"""From search results to neighbors: own documents filtered out, exact order, every row filled that
can be filled.

Used by the KNN map job and by live retrieval: one definition of which chunk is a neighbor. numpy
only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from indexing.knn_map import NO_NEIGHBOR

Search = Callable[[NDArray[np.float32], int], tuple[NDArray[np.float32], NDArray[np.int64]]]
Rows = Callable[[NDArray[np.int64]], NDArray[np.float16]]
Keys = Callable[[NDArray[np.int64]], NDArray[np.uint64]]

_TIE = 1e-5
_WIDEN = 4
_PAIRS = 1 << 18
_SCORED_PAIRS = 1 << 14


def take_first(
    candidates: NDArray[np.int64], banned: NDArray[np.bool_], k: int
) -> NDArray[np.int64]:
    """[N, k] the first k candidates [N, M] of each row that are not banned [N, M], in order; -1
    where they run out.

    A candidate -1 that is not banned keeps its place (NeMo's rule).
    """
    order = np.argsort(banned, axis=1, kind="stable")[:, :k]
    kept = np.where(
        np.take_along_axis(banned, order, 1), NO_NEIGHBOR, np.take_along_axis(candidates, order, 1)
    )
    if kept.shape[1] < k:
        kept = np.pad(kept, ((0, 0), (0, k - kept.shape[1])), constant_values=NO_NEIGHBOR)
    return kept


def exact_scores(queries: NDArray[np.float16], vectors: NDArray[np.float16]) -> NDArray[np.int64]:
    """[N, M] inner products of queries [N, D] with vectors [N, M, D], as exact integers in units of
    2^-48.

    fp16 values of unit vectors are multiples of 2^-24, so the products are integers that no order
    of summation changes:
    the ranking is the same on every machine and for every way of sharding.
    """
    scores = np.empty(vectors.shape[:2], np.int64)
    step = max(1, _SCORED_PAIRS // vectors.shape[1])
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        scores[rows] = np.einsum(
            "nd,nmd->nm", _as_integers(queries[rows]), _as_integers(vectors[rows])
        )
    return scores


def _as_integers(vectors: NDArray[np.float16]) -> NDArray[np.int64]:
    return (vectors.astype(np.float32) * 2.0**24).astype(np.int64)


@dataclass(frozen=True)
class NeighborFinder:
    """Finds the K best chunks of other documents, ordered by (score descending, id ascending).

    `search` proposes candidates by approximate float scores; `rows` gives the stored vectors of
    chunk ids for the exact order; `keys` the documents they belong to. `total` is the number of
    chunks that can be found; margin more candidates than K are asked for at first.
    """

    search: Search
    rows: Rows
    keys: Keys
    total: int
    margin: int

    def find(
        self, queries: NDArray[np.float16], k: int, own_keys: NDArray[np.uint64] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(ids [N, k], scores [N, k]) for queries [N, D]; chunks of the document own_keys[n] are
        not neighbors of n.

        A row whose filter left too few, or whose last place is tied with the end of the candidates,
        is searched again with more candidates until it is settled or everything was looked at. Rows
        of zeros get no neighbors.
        """
        ids = np.full((len(queries), k), NO_NEIGHBOR, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        pending = np.flatnonzero(np.any(queries != 0, axis=1))
        depth = k + self.margin
        while len(pending):
            depth = min(depth, self.total)
            unsettled = []
            for part in np.array_split(pending, -(-len(pending) * depth // _PAIRS)):
                own = None if own_keys is None else own_keys[part]
                ids[part], scores[part], settled = self._round(queries[part], k, own, depth)
                unsettled.append(part[~settled])
            pending = np.concatenate(unsettled)
            depth *= _WIDEN
        return ids, scores

    def _round(
        self, queries: NDArray[np.float16], k: int, own_keys: NDArray[np.uint64] | None, depth: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]:
        rough, candidates = self.search(queries.astype(np.float32), depth)
        banned = candidates < 0
        if own_keys is not None:
            keys = self.keys(np.maximum(candidates, 0).ravel()).reshape(candidates.shape)
            banned |= keys == own_keys[:, None]
        settled = self._settled(rough, candidates, banned, k, depth)
        return *self._rank(queries, candidates, banned, k), settled

    def _settled(
        self,
        rough: NDArray[np.float32],
        candidates: NDArray[np.int64],
        banned: NDArray[np.bool_],
        k: int,
        depth: int,
    ) -> NDArray[np.bool_]:
        """Rows whose K survivors are clearly better than anything the search did not return."""
        if depth >= self.total:
            return np.ones(len(rough), np.bool_)
        survivor_rank = np.cumsum(~banned, axis=1)
        kth = np.where((survivor_rank == k) & ~banned, rough, -np.inf).max(axis=1)
        return (candidates[:, -1] < 0) | (kth > rough[:, -1] + _TIE)

    def _rank(
        self,
        queries: NDArray[np.float16],
        candidates: NDArray[np.int64],
        banned: NDArray[np.bool_],
        k: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        vectors = self.rows(np.where(banned, NO_NEIGHBOR, candidates).ravel())
        exact = exact_scores(queries, vectors.reshape(*candidates.shape, -1))
        order = np.lexsort((candidates, -exact, banned), axis=1)
        ranked = np.take_along_axis(candidates, order, 1)
        ids = take_first(ranked, np.take_along_axis(banned, order, 1), k)
        best = np.take_along_axis(exact, order, 1)[:, :k]
        best = np.pad(best, ((0, 0), (0, k - best.shape[1])))
        return ids, np.where(ids >= 0, best / 2.0**48, -np.inf).astype(np.float32)
