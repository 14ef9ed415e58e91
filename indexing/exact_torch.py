"""Exact search with torch: stored vectors in blocks, a matrix product, the best k. CPU and CUDA.

On a GPU it searches tens of millions of vectors without faiss-gpu; on a CPU it is what recall is
measured against.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from indexing.embeddings import Embeddings

_QUERIES = 4096
_BLOCK_BYTES = 256 << 20
_RESIDENT_SHARE = 0.6


class TorchSearcher:
    """Searches chunk ids 0..stop-1 of `embeddings`; rows of zeros (no text) are never found.

    On CUDA products are float16 with float32 sums, rounded to float16 at the end; vectors stay in
    device memory if they take at most 60% of what is free, else they pass through it for each call.
    """

    def __init__(self, embeddings: Embeddings, stop: int, device: str) -> None:
        self._embeddings, self._stop, self._device = embeddings, stop, torch.device(device)
        is_cuda = self._device.type == "cuda"
        self._dtype = torch.float16 if is_cuda else torch.float32
        self.score_error: float | None = 2e-3 if is_cuda else 1e-5
        self.total = stop
        self._resident: list[tuple[int, torch.Tensor]] | None = None
        if is_cuda and stop * embeddings.dimension * 2 <= _RESIDENT_SHARE * self._free_bytes():
            self._resident = list(self._blocks())

    def _free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    def _blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first chunk id, vectors) in blocks of at most _BLOCK_BYTES as float32."""
        step = max(1, _BLOCK_BYTES // (4 * self._embeddings.dimension))
        for start in range(0, self._stop, step):
            yield start, self._block(start, min(start + step, self._stop))

    def _block(self, start: int, stop: int) -> torch.Tensor:
        parts = [part for _, part in self._embeddings.slices(start, stop)]
        host = torch.from_numpy(np.concatenate(parts))
        if self._device.type == "cuda":
            host = host.pin_memory()
        return host.to(self._device, self._dtype, non_blocking=True)

    def search(
        self, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(scores, ids), both [N, k], best first; id -1 and score -inf where there are fewer."""
        parts = torch.from_numpy(np.ascontiguousarray(queries)).split(_QUERIES)
        asked = [part.to(self._device, self._dtype) for part in parts]
        best = [self._nothing(len(part), k) for part in asked]
        for first, vectors in self._resident if self._resident is not None else self._blocks():
            has_text = vectors.any(dim=1)
            for i, part in enumerate(asked):
                scores = (part @ vectors.T).masked_fill_(~has_text, -torch.inf)
                best[i] = _merged(best[i], scores, first, k)
        scores, ids = (torch.cat(column).cpu() for column in zip(*best, strict=True))
        ids = torch.where(scores == -torch.inf, -1, ids)
        return scores.float().numpy(), ids.numpy()

    def _nothing(self, rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.full((rows, k), -torch.inf, dtype=self._dtype, device=self._device)
        return scores, torch.full((rows, k), -1, dtype=torch.int64, device=self._device)


def _merged(
    best: tuple[torch.Tensor, torch.Tensor], scores: torch.Tensor, first: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of what was found before and the scores of a block."""
    found, rows = scores.topk(min(k, scores.shape[1]), dim=1)
    every = torch.cat([best[0], found], dim=1)
    names = torch.cat([best[1], rows + first], dim=1)
    kept, places = every.topk(k, dim=1)
    return kept, names.gather(1, places)
