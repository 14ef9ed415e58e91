"""From search results to neighbors: own documents filtered out, exact order, every row filled that
can be filled.

Used by the KNN map job and by live retrieval: one definition of which chunk is a neighbor. numpy
only.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from indexing.knn_map import NO_NEIGHBOR

Rows = Callable[[NDArray[np.int64]], NDArray[np.float16]]
Score = TypeVar("Score", np.float32, np.float64)
Keys = Callable[[NDArray[np.int64]], NDArray[np.uint64]]
Spans = Callable[[NDArray[np.uint64]], NDArray[np.int64]]

Block = tuple[NDArray[np.int64], NDArray[np.float64]]

_WIDEN = 4
_RANKED_AGAIN = 5
_PAIRS = 1 << 18
_SCORED_PAIRS = 1 << 14
_LONG = 1 << 10


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


class Searcher(Protocol):
    """What proposes candidates (`indexing/searchers.py`).

    total: how many vectors there are. score_error: bound on the distance of a score from the inner
    product of the stored vectors; None if there is none.
    """

    total: int
    score_error: float | None

    def search(
        self, queries: NDArray[np.float32], k: int, skip: range | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(scores, ids), both [N, k], best first; id -1 where there are fewer. None of the chunk
        ids in `skip` is wanted: who can leave them out does."""
        ...


def exact_scores(queries: NDArray[np.float16], vectors: NDArray[np.float16]) -> NDArray[np.float64]:
    """[N, M] inner products of queries [N, D] with vectors [N, M, D], without any rounding.

    fp16 values of unit vectors are multiples of 2^-24, so products and their sums are multiples of
    2^-48 below 2, which float64 holds exactly in whatever order they are added: the ranking is the
    same on every machine and for every way of sharding.
    """
    scores = np.empty(vectors.shape[:2])
    step = max(1, _SCORED_PAIRS // vectors.shape[1])
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        left = queries[rows].astype(np.float64)[:, :, None]
        scores[rows] = (vectors[rows].astype(np.float64) @ left)[..., 0]
    return scores


@dataclass(frozen=True)
class NeighborFinder:
    """Finds the K best chunks of other documents, ordered by (score descending, id ascending).

    `candidates` proposes chunks by approximate scores; `rows` gives the stored vectors of chunk ids
    for the exact order; `keys` [..., 2] the documents and clusters they belong to; margin more
    candidates than K are asked for at first; `spans` [N, 2] the first chunk, and the last + 1, of
    documents by key, which spares chunks of long documents a search that finds mostly their own.

    Of the chunks that the search can reach (all, or those of the visited inverted lists) the result
    is exactly the K best, as long as `candidates.score_error` is known. Else the best of
    5K candidates are taken.
    """

    candidates: Searcher
    rows: Rows
    keys: Keys
    margin: int
    spans: Spans | None = None

    def find(
        self, queries: NDArray[np.float16], k: int, own_keys: NDArray[np.uint64] | None
    ) -> Block:
        """(ids [N, k], exact scores [N, k]) for queries [N, D]; chunks whose document or
        cluster is that of own_keys [N, 2] are not neighbors of n; -1 and -inf where there are
        fewer.

        A row is searched again with more candidates until it is settled or everything was looked
        at. Rows of zeros get no neighbors.
        """
        ids, scores = _nothing(len(queries), k)
        for rows, skip in self._by_long_document(np.any(queries != 0, axis=1), own_keys):
            own = None if own_keys is None else own_keys[rows]
            ids[rows], scores[rows] = self._settle(queries[rows], k, own, skip)
        return ids, scores

    def _by_long_document(
        self, is_query: NDArray[np.bool_], own_keys: NDArray[np.uint64] | None
    ) -> Iterator[tuple[NDArray[np.intp], range | None]]:
        """Row numbers of queries, and the chunks of their document if it is a long one."""
        if own_keys is None or self.spans is None:
            yield np.flatnonzero(is_query), None
            return
        spans = self.spans(own_keys[:, 0])
        is_long = is_query & (spans[:, 1] - spans[:, 0] >= _LONG)
        yield np.flatnonzero(is_query & ~is_long), None
        for start in np.unique(spans[is_long, 0]):
            rows = np.flatnonzero(is_long & (spans[:, 0] == start))
            yield rows, range(*spans[rows[0]])

    def _settle(
        self,
        queries: NDArray[np.float16],
        k: int,
        own_keys: NDArray[np.uint64] | None,
        skip: range | None,
    ) -> Block:
        ids, scores = _nothing(len(queries), k)
        pending = np.arange(len(queries))
        is_coarse = self.candidates.score_error is None
        depth = ranked = max(k + self.margin, _RANKED_AGAIN * k if is_coarse else 0)
        while len(pending):
            depth, unsettled, was_short = min(depth, self.candidates.total), [], False
            for part in np.array_split(pending, -(-len(pending) * depth // _PAIRS)):
                own = None if own_keys is None else own_keys[part]
                found = self._round(queries[part], k, own, skip, depth, ranked)
                ids[part], scores[part], settled, is_short = found
                unsettled.append(part[~settled])
                was_short |= is_short
            pending = np.concatenate(unsettled)
            depth *= _WIDEN
            ranked *= _WIDEN if was_short else 1
        return ids, scores

    def _round(
        self,
        queries: NDArray[np.float16],
        k: int,
        own_keys: NDArray[np.uint64] | None,
        skip: range | None,
        depth: int,
        ranked: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_], bool]:
        """(ids, scores, which rows are settled, whether one is not because more of its candidates
        must be ranked). Of `depth` candidates the first `ranked` allowed ones are ranked by exact
        scores: a long document bans thousands."""
        rough, found = self.candidates.search(queries.astype(np.float32), depth, skip)
        banned = found < 0
        if own_keys is not None:
            keys = self.keys(np.maximum(found, 0).ravel()).reshape(*found.shape, 2)
            banned |= (keys == own_keys[:, None]).any(axis=-1)
        seen_all = (found[:, -1] < 0) | (depth >= self.candidates.total)
        order = np.argsort(banned, axis=1, kind="stable")[:, :ranked]
        is_cut = (~banned).sum(axis=1) > ranked
        ids, scores = self._rank(
            queries, np.take_along_axis(found, order, 1), np.take_along_axis(banned, order, 1), k
        )
        if self.candidates.score_error is None:
            return ids, scores, seen_all | (ids[:, -1] >= 0), False
        # What was not ranked scores no more than the last that was, or than the last candidate.
        last = np.where(is_cut, np.take_along_axis(rough, order, 1)[:, -1], rough[:, -1])
        is_clear: NDArray[np.bool_] = scores[:, -1] > last + self.candidates.score_error
        return ids, scores, is_clear | (seen_all & ~is_cut), bool((is_cut & ~is_clear).any())

    def _rank(
        self,
        queries: NDArray[np.float16],
        candidates: NDArray[np.int64],
        banned: NDArray[np.bool_],
        k: int,
    ) -> Block:
        vectors = self.rows(np.where(banned, NO_NEIGHBOR, candidates).ravel())
        exact = exact_scores(queries, vectors.reshape(*candidates.shape, -1))
        exact[banned] = -np.inf
        order = np.lexsort((candidates, -exact), axis=1)
        ranked = np.take_along_axis(candidates, order, 1)
        ids = take_first(ranked, np.take_along_axis(banned, order, 1), k)
        best = np.take_along_axis(exact, order, 1)[:, :k]
        return ids, np.pad(best, ((0, 0), (0, k - best.shape[1])), constant_values=-np.inf)


def _nothing(rows: int, k: int) -> Block:
    """No neighbors yet."""
    return np.full((rows, k), NO_NEIGHBOR, np.int64), np.full((rows, k), -np.inf)


def best_of(
    parts: Sequence[tuple[NDArray[np.int64], NDArray[Score]]],
) -> tuple[NDArray[np.int64], NDArray[Score]]:
    """(ids, scores), both [N, K], of results of the same queries in disjoint parts of an index."""
    k = parts[0][0].shape[1]
    ids, scores = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)
