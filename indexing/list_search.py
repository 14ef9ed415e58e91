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


def search_by_list(
    lists: InvertedLists, queries: NDArray[np.float32], nprobe: int, k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(scores, ids), both [N, k], best first by inner product with the decoded vectors, exact to
    about 1e-3; id -1 where the visited lists hold fewer than k."""
    visited = lists.assign(queries, nprobe)
    units = in_units(queries)
    edges = [0, *(edge for edge in _PHASES if edge < visited.shape[1]), visited.shape[1]]
    hits: Hits = (np.empty(0, np.intp), np.empty(0, np.float32), np.empty(0, np.int64))
    floor = np.full(len(queries), -np.inf, np.float32)
    for start, stop in pairwise(edges):
        found = list(_visit(lists, units, visited[:, start:stop], floor))
        hits = _best([hits, *found], len(queries), k)
        floor = _kth(hits, len(queries), k)
    return _table(hits, len(queries), k)


def _visit(
    lists: InvertedLists,
    queries: NDArray[np.float32],
    visited: NDArray[np.int64],
    floor: NDArray[np.float32],
) -> Iterator[Hits]:
    """(query numbers, scores, ids) of all vectors of the visited lists that reach their query's
    floor."""
    order = np.argsort(visited, axis=None, kind="stable")
    owners = order // visited.shape[1]
    limits = np.searchsorted(visited.ravel()[order], np.arange(lists.num_lists + 1))
    for number in np.flatnonzero(np.diff(limits)):
        rows = owners[limits[number] : limits[number + 1]]
        ids, vectors = lists.read(int(number))
        if len(ids) == 0:
            continue
        scores = queries[rows] @ in_units(vectors).T
        places = np.flatnonzero(scores >= floor[rows, None])
        row = places // len(ids)
        yield rows[row], scores.ravel()[places], ids[places - row * len(ids)]


def _best(parts: list[Hits], num_queries: int, k: int) -> Hits:
    """The k best hits of each query, ordered by query, score and id."""
    rows, scores, ids = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((ids, -scores, rows))
    rows = rows[order]
    rank = _rank(rows, num_queries)
    kept = order[rank < k]
    return rows[rank < k], scores[kept], ids[kept]


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
