"""Exact search with torch: stored vectors in blocks, a matrix product, the best k. CPU and CUDA.

On a GPU it searches tens of millions of vectors without faiss-gpu; on a CPU it is what recall is
measured against.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from indexing.embeddings import Embeddings

_QUERIES = 4096
_BLOCK_BYTES = 256 << 20
_RESIDENT_SHARE = 0.6
_GROUP = 64


@dataclass(frozen=True)
class Block:
    """Chunk ids [M] int64 and vectors [M, D] on the device; the first `count` are real, the others
    fill M up to a multiple of _GROUP, which matrix products want too."""

    ids: torch.Tensor
    vectors: torch.Tensor
    count: int


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
        self._resident: list[Block] | None = None
        if is_cuda and stop * embeddings.dimension * 2 <= _RESIDENT_SHARE * self._free_bytes():
            self._resident = list(self._blocks())

    def _free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    def _blocks(self) -> Iterator[Block]:
        """Vectors with text in blocks of at most _BLOCK_BYTES as float32."""
        step = max(_GROUP, _BLOCK_BYTES // (4 * self._embeddings.dimension) // _GROUP * _GROUP)
        for start in range(0, self._stop, step):
            yield self._block(start, min(start + step, self._stop))

    def _block(self, start: int, stop: int) -> Block:
        vectors = np.concatenate([part for _, part in self._embeddings.slices(start, stop)])
        kept = np.flatnonzero(vectors.any(axis=1))
        filled = -(-len(kept) // _GROUP) * _GROUP
        pin = self._device.type == "cuda"
        ids = torch.full((filled,), -1, pin_memory=pin)
        rows = torch.zeros((filled, vectors.shape[1]), dtype=torch.float16, pin_memory=pin)
        ids[: len(kept)] = torch.from_numpy(kept + start)
        rows[: len(kept)] = torch.from_numpy(vectors[kept])
        moved = rows.to(self._device, non_blocking=True).to(self._dtype)
        return Block(ids.to(self._device, non_blocking=True), moved, len(kept))

    def search(
        self, queries: NDArray[np.float32], k: int, skip: range | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(scores, ids), both [N, k], best first; id -1 and score -inf where there are fewer."""
        parts = torch.from_numpy(np.ascontiguousarray(queries)).split(_QUERIES)
        asked = [part.to(self._device, self._dtype) for part in parts]
        best = [self._nothing(len(part), k) for part in asked]
        for block in self._resident if self._resident is not None else self._blocks():
            for i, part in enumerate(asked):
                scores = part @ block.vectors.T
                scores[:, block.count :] = -torch.inf
                if skip is not None:
                    unwanted = (block.ids >= skip.start) & (block.ids < skip.stop)
                    scores[:, unwanted] = -torch.inf
                found, places = _top(scores, k)
                best[i] = _merged(best[i], found, block.ids[places], k)
        scores, ids = (torch.cat(column).cpu() for column in zip(*best, strict=True))
        return scores.float().numpy(), ids.numpy()

    def _nothing(self, rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.full((rows, k), -torch.inf, dtype=self._dtype, device=self._device)
        return scores, torch.full((rows, k), -1, dtype=torch.int64, device=self._device)


def _top(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each row [N, k] and their columns; fewer where there are fewer columns.

    The k best lie in the k groups of columns whose maxima are the largest, and finding maxima takes
    one pass where sorting takes many.
    """
    columns = scores.shape[1]
    groups = columns // _GROUP
    if groups <= 2 * k:
        return scores.topk(min(k, columns), dim=1)
    maxima = scores.unflatten(1, (groups, _GROUP)).amax(dim=2)
    chosen = maxima.topk(k, dim=1, sorted=False).indices
    inside = torch.arange(_GROUP, device=scores.device)
    places = (chosen[:, :, None] * _GROUP + inside).flatten(1)
    found, which = scores.gather(1, places).topk(k, dim=1)
    return found, places.gather(1, which)


def _merged(
    best: tuple[torch.Tensor, torch.Tensor], scores: torch.Tensor, ids: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of what was found before and what a block holds."""
    kept, places = torch.cat([best[0], scores], dim=1).topk(k, dim=1)
    return kept, torch.cat([best[1], ids], dim=1).gather(1, places)
