"""Neighbor lists of a KNN map, or of searches, as a table for `indexing/quality_tables.py`: a row a
slot, with how long a run of tokens the neighbor shares with its chunk where that is measured.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from etl.dataset import Dataset
from indexing.knn_map import KNNMap
from indexing.neighbors import NeighborFinder
from indexing.overlap import longest_common_runs
from indexing.quality_rows import TableWriter

SLOTS = ("query", "query_document", "neighbor", "neighbor_document", "run")
NOT_MEASURED = -1
_BLOCK_ROWS = 1 << 16
_SEARCHED = 1 << 10
_PAIRS = 1 << 12

ListBlock = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class ListFacts:
    """How full neighbor lists are.

    Attributes:
        rows: Lists of chunks with text; rows_without_text are those of others.
        short: Lists with fewer than K neighbors; of these, without have none.
        slots: Neighbors in them.
        measured: Slots whose overlap of tokens was measured.
    """

    k: int
    rows: int = 0
    rows_without_text: int = 0
    short: int = 0
    without: int = 0
    slots: int = 0
    measured: int = 0


def write_slots(
    folder: Path,
    queries: Dataset,
    retrieval: Dataset,
    blocks: Iterable[ListBlock],
    k: int,
    measured: NDArray[np.int64],
) -> ListFacts:
    """Writes a row for each neighbor of the lists (query chunk ids [N], neighbor ids [N, k]).

    `run` is the longest run of tokens that both have in common, the neighbor with its continuation,
    for the query chunk ids `measured` (ascending), else -1.
    """
    totals = np.zeros(6, np.int64)
    with TableWriter(folder, SLOTS) as table:
        for ids, found in blocks:
            runs = np.full(found.shape, NOT_MEASURED, np.int64)
            rows = np.flatnonzero(np.isin(ids, measured))
            runs[rows] = overlaps(queries, retrieval, ids[rows], found[rows])
            row, slot = np.nonzero(found >= 0)
            columns = {
                "query": ids[row],
                "query_document": queries.chunk_to_doc(ids[row]),
                "neighbor": found[row, slot],
                "neighbor_document": retrieval.chunk_to_doc(found[row, slot]),
                "run": runs[row, slot],
            }
            table.add(columns)
            has_text = queries.chunk_bytes(ids) > 0
            filled_rows = (found[has_text] >= 0).sum(axis=1)
            totals += np.asarray(
                [
                    len(filled_rows),
                    (~has_text).sum(),
                    (filled_rows < k).sum(),
                    (filled_rows == 0).sum(),
                    filled_rows.sum(),
                    (columns["run"] != NOT_MEASURED).sum(),
                ]
            )
    return ListFacts(k, *totals.tolist())


def overlaps(
    queries: Dataset, retrieval: Dataset, ids: NDArray[np.int64], found: NDArray[np.int64]
) -> NDArray[np.int64]:
    """[N, K] longest common run of tokens of query chunks [N] and neighbors [N, K]; 0 where there
    is no neighbor. Pads are common to nobody."""
    runs = np.zeros(found.shape, np.int64)
    step = max(1, _PAIRS // found.shape[1])
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        chunks = queries.get_chunk(ids[part], continuation=False)
        others = retrieval.get_chunk(np.maximum(found[part], 0).ravel())
        others = others.reshape(*found[part].shape, -1)
        there = (others != retrieval.manifest.pad_id) & (found[part] >= 0)[..., None]
        has_token = chunks != queries.manifest.pad_id
        runs[part] = longest_common_runs(chunks, others, has_token, there)
    return runs


def map_lists(knn_map: KNNMap, k: int) -> Iterator[ListBlock]:
    """The first k columns of a map, block by block."""
    for start in tqdm(
        range(0, knn_map.rows, _BLOCK_ROWS), "map", unit="block", file=sys.stderr, mininterval=2
    ):
        found = np.asarray(knn_map.neighbors[start : start + _BLOCK_ROWS, :k])
        yield np.arange(start, start + len(found)) + knn_map.chunk_start, found


def searched_lists(
    finder: NeighborFinder, retrieval: Dataset, ids: NDArray[np.int64], k: int
) -> Iterator[ListBlock]:
    """Neighbors of retrieval chunks `ids`, among chunks of other documents, block by block."""
    for start in tqdm(
        range(0, len(ids), _SEARCHED), "search", unit="block", file=sys.stderr, mininterval=2
    ):
        part = ids[start : start + _SEARCHED]
        yield part, finder.find(finder.rows(part), k, retrieval.chunk_keys(part))[0]
