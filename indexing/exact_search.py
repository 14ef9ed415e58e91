"""Exact search over stored vectors, block by block, without an index: what recall is measured
against. Faiss on the CPU, torch on CUDA (`indexing/exact_torch.py`)."""

import faiss
import numpy as np
from numpy.typing import NDArray

from indexing.embeddings import Embeddings
from indexing.neighbors import Searcher
from indexing.searchers import ROUNDING, Found


class BlockSearcher:
    """Searches chunk ids 0..stop-1 of `embeddings`; rows of zeros (no text) are never found."""

    def __init__(self, embeddings: Embeddings, stop: int) -> None:
        self._embeddings, self.total = embeddings, stop
        self.score_error: float | None = ROUNDING

    def search(self, queries: NDArray[np.float32], k: int, skip: range | None = None) -> Found:
        """(scores, ids), both [N, k], best first; id -1 and score -inf where there are fewer."""
        heap = faiss.ResultHeap(len(queries), k, keep_max=True)
        heap.I[:] = -1
        for first, block in self._embeddings.slices(0, self.total):
            kept = np.flatnonzero(np.any(block != 0, axis=1))
            if skip is not None:
                kept = kept[(kept + first < skip.start) | (kept + first >= skip.stop)]
            if len(kept):
                vectors, many = block[kept].astype(np.float32), min(k, len(kept))
                scores, rows = faiss.knn(queries, vectors, many, faiss.METRIC_INNER_PRODUCT)
                heap.add_result(scores, kept[rows] + first)
        heap.finalize()
        return np.where(heap.I < 0, -np.inf, heap.D).astype(np.float32), heap.I


def exact_searcher(embeddings: Embeddings, stop: int, device: str) -> Searcher:
    """Exact search of chunk ids 0..stop-1 on a device."""
    if device == "cpu":
        return BlockSearcher(embeddings, stop)
    from indexing.exact_torch import TorchSearcher

    return TorchSearcher(embeddings, stop, device)
