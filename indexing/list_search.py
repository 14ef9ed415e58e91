"""Search of many queries at once in an IVF index: list by list instead of query by query.

All queries of a map are known beforehand, so each inverted list is decoded once for all the queries
that visit it, and compared by one matrix product of integers (`indexing/inverted_lists.py`): a
score does not depend on what else is searched, and ties are broken by id.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from indexing.inverted_lists import UNIT, InvertedLists, in_units

Hits = tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.int64]]

# The nearest lists come first: what they give bounds what the many others can add.
_PHASES = (1, 4, 16)
_SCORES = 1 << 22
_SCORE_LIMIT = 1 << 25


def search_by_list(
    lists: InvertedLists,
    queries: NDArray[np.float32],
    nprobe: int,
    k: int,
    skip: range | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(scores, ids), both [N, k], best first by inner product with the decoded vectors, exact to
    about 1e-3; id -1 where the visited lists hold fewer than k. Ids in `skip` are left out."""
    visited = lists.assign(queries, nprobe)
    units = in_units(queries)
    edges = [0, *(edge for edge in _PHASES if edge < visited.shape[1]), visited.shape[1]]
    hits: Hits = (np.empty(0, np.intp), np.empty(0, np.float32), np.empty(0, np.int64))
    floor = np.full(len(queries), -np.inf, np.float32)
    for start, stop in pairwise(edges):
        found = list(_visit(lists, units, visited[:, start:stop], floor, k, skip))
        hits = _best([hits, *found], len(queries), k)
        floor = _kth(hits, len(queries), k)
    return _table(hits, len(queries), k)


def _visit(
    lists: InvertedLists,
    queries: NDArray[np.float32],
    visited: NDArray[np.int64],
    floor: NDArray[np.float32],
    k: int,
    skip: range | None,
) -> Iterator[Hits]:
    """(query numbers, scores, ids) of the vectors of the visited lists that reach their query's
    floor, and can be among its k best."""
    order = np.argsort(visited, axis=None, kind="stable")
    owners = order // visited.shape[1]
    limits = np.searchsorted(visited.ravel()[order], np.arange(lists.num_lists + 1))
    for number in np.flatnonzero(np.diff(limits)):
        ids, vectors = lists.read(int(number))
        if skip is not None:
            wanted = (ids < skip.start) | (ids >= skip.stop)
            ids, vectors = ids[wanted], vectors[wanted]
        if len(ids) == 0:
            continue
        units = in_units(vectors).T
        step = max(1, _SCORES // len(ids))
        for start in range(limits[number], limits[number + 1], step):
            rows = owners[start : min(start + step, limits[number + 1])]
            row, scores, found = _reaching(queries[rows] @ units, floor[rows], ids, k)
            yield rows[row], scores, found


def _reaching(
    scores: NDArray[np.float32], floor: NDArray[np.float32], ids: NDArray[np.int64], k: int
) -> Hits:
    """Hits of scores [R, L] that reach floor [R]; never more than k a row on the average, whatever
    the length of the list."""
    num_rows, length = scores.shape
    places = np.flatnonzero(scores >= floor[:, None])
    has_many = len(places) > k * num_rows
    if has_many:
        kth = np.partition(scores, length - k, axis=1)[:, length - k]
        places = np.flatnonzero(scores >= np.maximum(floor, kth)[:, None])
    row = places // length
    hits = row, scores.ravel()[places], ids[places - row * length]
    return _best([hits], num_rows, k) if has_many else hits


def _best(parts: list[Hits], num_queries: int, k: int) -> Hits:
    """The k best hits of each query, ordered by query, score and id."""
    rows, scores, ids = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = _order(rows, scores, ids)
    rows = rows[order]
    rank = _rank(rows, num_queries)
    kept = order[rank < k]
    return rows[rank < k], scores[kept], ids[kept]


def _order(
    rows: NDArray[np.intp], scores: NDArray[np.float32], ids: NDArray[np.int64]
) -> NDArray[np.intp]:
    """Order by row, score (integers, greatest first) and id: one sort of packed keys, and one of
    what is equal in them."""
    keys = rows * (2 * _SCORE_LIMIT) + (_SCORE_LIMIT - scores.astype(np.int64))
    order = np.argsort(keys)
    is_next_equal = np.diff(keys[order]) == 0
    equal = np.flatnonzero(np.append(is_next_equal, False) | np.append(False, is_next_equal))
    order[equal] = order[equal][np.lexsort((ids[order[equal]], keys[order[equal]]))]
    return order


def _rank(rows: NDArray[np.intp], num_queries: int) -> NDArray[np.intp]:
    """Place of each hit among those of its query; rows ascend."""
    return np.arange(len(rows)) - np.searchsorted(rows, np.arange(num_queries))[rows]


def _kth(hits: Hits, num_queries: int, k: int) -> NDArray[np.float32]:
    """[N] score of the k-th hit of each query; -inf where there are fewer."""
    rows, scores, _ = hits
    counts = np.bincount(rows, minlength=num_queries)
    floor = np.full(num_queries, -np.inf, np.float32)
    floor[counts == k] = scores[(np.cumsum(counts) - 1)[counts == k]]
    return floor


def _table(hits: Hits, num_queries: int, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rows, scores, ids = hits
    rank = _rank(rows, num_queries)
    table = np.full((num_queries, k), -np.inf, np.float32)
    names = np.full((num_queries, k), -1, np.int64)
    table[rows, rank], names[rows, rank] = scores / np.float32(UNIT * UNIT), ids
    return table, names
