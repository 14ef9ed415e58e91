"""What sampled searches tell about an index: recall against exact search, whether a chunk finds
itself, scores of neighbors and of random pairs. Part of `indexing/quality.py`; works on stored
vectors, so no embedder is needed.
"""

from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etl.dataset import Dataset
from etl.storage import StageFolder, StoredFile
from indexing.built_index import BuiltIndex
from indexing.exact_search import exact_searcher
from indexing.knn_manifest import BuiltMap
from indexing.knn_map import KNNMap
from indexing.neighbors import NeighborFinder, exact_scores
from indexing.quality_tables import Backend
from indexing.recall import RecallSample, sample_recall, tune

FULL_RECALL = 0.999
_MARGIN = 16
_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_BINS = 60


@dataclass(frozen=True)
class QualityOptions:
    """How much is measured.

    Attributes:
        neighbors: K of recall, scores and neighbor lists.
        queries: Chunks sampled for recall, search for themselves, scores, and overlap of tokens.
        listed: Without a map: chunks whose neighbors are searched for hubs and origins; all, if
            there are no more.
        few_tokens: Chunks with fewer tokens than this are counted.
        nprobe: Inverted lists a query visits, instead of the index's default.
        seed: Of all samples.
        backend: What the tables are counted with.
    """

    neighbors: int = 10
    queries: int = 2000
    listed: int = 20_000
    few_tokens: int = 8
    nprobe: int | None = None
    seed: int = 0
    backend: Backend = "pandas"

    def __post_init__(self) -> None:
        for name in ("neighbors", "queries", "listed", "few_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class Judged:
    """What is judged: an index of `retrieval`, and a map from chunks of `training` into it."""

    index: BuiltIndex
    retrieval: Dataset
    training: Dataset | None = None
    map: BuiltMap | None = None
    device: str = "cpu"
    options: QualityOptions = field(default_factory=QualityOptions)

    @property
    def k(self) -> int:
        """Neighbors of a list."""
        if self.map is None:
            return self.options.neighbors
        return min(self.options.neighbors, self.knn_map.k)

    @cached_property
    def knn_map(self) -> KNNMap:
        """The map, its bytes and ids checked."""
        assert self.map is not None
        file = StoredFile(**self.map.manifest["files"]["map"])
        found = KNNMap(StageFolder(self.map.url).fetch_verified(file))
        found.check_ids(self.retrieval.num_chunks)
        return found

    @cached_property
    def finder(self) -> NeighborFinder:
        """Search with all that defines a neighbor."""
        searcher = self.index.searcher(self.options.nprobe, self.device)
        keys, spans = self.retrieval.chunk_keys, self.retrieval.chunk_spans
        return NeighborFinder(searcher, self.index.embeddings.rows, keys, _MARGIN, spans)

    @cached_property
    def sample(self) -> RecallSample:
        """Indexed chunks with text, and what exact search finds for them."""
        embeddings = self.index.embeddings
        exact = exact_searcher(embeddings, self.index.manifest["indexed_chunks"], self.device)
        options = self.options
        return sample_recall(embeddings, exact, options.queries, options.neighbors, options.seed)

    def sampled(self, total: int) -> NDArray[np.int64]:
        """Ascending numbers below `total`, as many as there are queries."""
        return _chosen(total, self.options.queries, self.options.seed)

    def listed(self) -> NDArray[np.int64]:
        """Indexed chunks whose neighbors are searched where there is no map."""
        total = self.index.manifest["indexed_chunks"]
        return _chosen(total, self.options.listed, self.options.seed)


def _chosen(total: int, count: int, seed: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(total, min(count, total), replace=False))


def recall_curve(judged: Judged) -> list[dict[str, Any]]:
    """Recall by visited lists: as it was measured when the index was tuned, else now, at powers of
    two up to full recall; [] without inverted lists."""
    known = judged.index.manifest.get("recall_by_nprobe")
    lists = judged.index.num_lists()
    if known or not lists:
        return known or []
    open_at = lambda nprobe: judged.index.searcher(nprobe, judged.device)
    _, curve = tune(judged.sample, open_at, lists, FULL_RECALL)
    return [{"nprobe": nprobe, **found.json} for nprobe, found in curve]


def self_search(judged: Judged) -> dict[str, Any]:
    """Whether sampled chunks are the first result of a search for their own vector, re-ranked as
    neighbors are. An equal score counts: equal chunks are not told apart. `missed`: what was found
    scores less; `outscored`: another vector scores more, which a longer one does."""
    ids, queries = judged.sample.ids, judged.sample.queries
    found, scores = judged.finder.find(queries, 1, None)
    own = exact_scores(queries, queries[:, None])[:, 0]
    is_first = (found[:, 0] == ids) | (scores[:, 0] == own)
    counts = {
        "queries": len(ids),
        "found": int(is_first.sum()),
        "missed": int((~is_first & (scores[:, 0] < own)).sum()),
        "outscored": int((~is_first & (scores[:, 0] > own)).sum()),
    }
    low, high = wilson(counts["found"], len(ids))
    share = counts["found"] / max(1, len(ids))
    return {**counts, "share": share, "low_95": low, "high_95": high}


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share, which has a width at 0 and 1 too."""
    if trials == 0:
        return 0.0, 1.0
    z, share = 1.96, successes / trials
    middle = share + z * z / (2 * trials)
    half = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def score_summaries(judged: Judged) -> dict[str, Any]:
    """Inner products of sampled chunks with their first and K-th neighbor and of random pairs of
    sampled chunks; of a map's rows as it stores them."""
    sample, k = judged.sample, judged.sample.k
    own_keys = judged.retrieval.chunk_keys(sample.ids)
    _, scores = judged.finder.find(sample.queries, k, own_keys)
    order = np.random.default_rng(judged.options.seed).permutation(len(sample.ids))
    left, right = sample.queries[order], sample.queries[np.roll(order, 1)]
    columns = {
        "first": scores[:, 0],
        "kth": scores[:, -1],
        "random": exact_scores(left, right[:, None])[:, 0],
    }
    if judged.map is not None and "scores" in judged.map.manifest["files"]:
        rows = judged.sampled(judged.knn_map.rows)
        stored = _map_scores(judged.map)[rows].astype(np.float64)
        columns |= {"map_first": stored[:, 0], "map_kth": stored[:, judged.k - 1]}
    return {"k": k} | {name: distribution(values) for name, values in columns.items()}


def _map_scores(built: BuiltMap) -> NDArray[np.float16]:
    path = StageFolder(built.url).fetch_verified(StoredFile(**built.manifest["files"]["scores"]))
    return np.load(path, mmap_mode="r", allow_pickle=False)


def distribution(values: NDArray[np.float64]) -> dict[str, Any]:
    """Count, mean, quantiles and a histogram of the finite ones among the values."""
    values = values[np.isfinite(values)]
    if not len(values):
        return {"count": 0}
    counts, edges = np.histogram(values, _BINS)
    quantiles = np.quantile(values, _QUANTILES).tolist()
    return {
        "count": len(values),
        "mean": float(values.mean()),
        "quantiles": {f"{q:g}": value for q, value in zip(_QUANTILES, quantiles, strict=True)},
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }
