"""How many of the true nearest chunks a search finds, and how many lists it must visit for that."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from indexing.embeddings import Embeddings
from indexing.neighbors import NeighborFinder, Searcher, exact_scores

_MARGIN = 16


@dataclass(frozen=True)
class Recall:
    """recall_at_k with the half-width of its 95% interval, over `queries` sampled chunks."""

    k: int
    recall_at_k: float
    half_width_95: float
    queries: int

    @property
    def json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class RecallSample:
    """Sampled chunks and the exact score of their k-th nearest other chunk.

    A found chunk counts if it scores at least as high: ties are no misses. A chunk is not its own
    neighbor, which any search finds.
    """

    embeddings: Embeddings
    ids: NDArray[np.int64]
    queries: NDArray[np.float16]
    kth_scores: NDArray[np.float64]
    k: int

    def measure(self, searcher: Searcher) -> Recall:
        found = _neighbors(searcher, self.embeddings, self.ids, self.queries, self.k)
        vectors = self.embeddings.rows(found.ravel()).reshape(*found.shape, -1)
        scores = exact_scores(self.queries, vectors)
        hits = ((scores >= self.kth_scores[:, None]) & (found >= 0)).mean(axis=1)
        half_width = 1.96 * float(hits.std()) / sqrt(max(1, len(hits)))
        return Recall(self.k, float(hits.mean()), half_width, len(hits))


def sample_recall(
    embeddings: Embeddings, exact: Searcher, count: int, k: int, seed: int
) -> RecallSample:
    """`count` chunks with text among those that `exact` searches, drawn without replacement; k is
    less where there are fewer others."""
    ids = np.sort(np.random.default_rng(seed).permutation(exact.total)[:count])
    queries = embeddings.rows(ids)
    has_text = np.any(queries != 0, axis=1)
    ids, queries = ids[has_text], queries[has_text]
    found = _neighbors(exact, embeddings, ids, queries, k)
    k = max(1, int((found >= 0).sum(axis=1).min(initial=k)))
    last = embeddings.rows(found[:, k - 1])
    return RecallSample(embeddings, ids, queries, exact_scores(queries, last[:, None])[:, 0], k)


def _neighbors(
    searcher: Searcher,
    embeddings: Embeddings,
    ids: NDArray[np.int64],
    queries: NDArray[np.float16],
    k: int,
) -> NDArray[np.int64]:
    finder = NeighborFinder(searcher, embeddings.rows, _pairs, _MARGIN)
    return finder.find(queries, k, _pairs(ids))[0]


def _pairs(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Keys by which a chunk is banned from its own row only."""
    return np.stack([ids, ids], axis=-1).astype(np.uint64)


def tune(
    sample: RecallSample, open_at: Callable[[int], Searcher], num_lists: int, target_recall: float
) -> tuple[int, list[tuple[int, Recall]]]:
    """(nprobe, curve): the least power of two of visited lists whose recall reaches the target, or
    all lists; the curve goes on to the first one beyond."""
    curve: list[tuple[int, Recall]] = []
    nprobe, best = 1, None
    while True:
        nprobe = min(nprobe, num_lists)
        curve.append((nprobe, sample.measure(open_at(nprobe))))
        if best is not None or nprobe == num_lists:
            return best or nprobe, curve
        if curve[-1][1].recall_at_k >= target_recall:
            best = nprobe
        nprobe *= 2
