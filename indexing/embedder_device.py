"""One loop over batches for every device: forward passes, results back in order.

On CUDA, batches lie in pinned memory and are copied on a stream of their own, so that the copy of
the next one runs beside the forward pass; results stay on the device until one last copy. On a CPU
every batch is one thread's work, so that the bits do not depend on how many threads there are.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from indexing.token_rows import ahead

if TYPE_CHECKING:
    from torch import Tensor

_CPU_LOCK = threading.Lock()
_CUDA_MULTIPLE = 8
_MOST_READING_THREADS = 8


@dataclass(frozen=True)
class Batch:
    """B rows of L token ids: int64 ids and mask [B, L], and the positions [B] of their vectors."""

    where: "Tensor"
    ids: "Tensor"
    mask: "Tensor"


class Device:
    """Where a model computes.

    Attributes:
        multiple: Batches are padded to a multiple of this many tokens.
        reading_threads: Threads that make rows of text ahead of the model.
    """

    def __init__(self, name: str) -> None:
        import torch

        self._device = torch.device(name)
        self._cuda = self._device.type == "cuda"
        self.multiple = _CUDA_MULTIPLE if self._cuda else 1
        cores = len(os.sched_getaffinity(0))
        self.reading_threads = min(cores, _MOST_READING_THREADS) if self._cuda else 1

    def host_batch(
        self, where: NDArray[np.int64], ids: NDArray[np.int64], mask: NDArray[np.int64]
    ) -> Batch:
        """The batch in host memory, pinned if it is to go to a GPU."""
        import torch

        parts = [torch.from_numpy(array) for array in (where, ids, mask)]
        return Batch(*(part.pin_memory() for part in parts) if self._cuda else parts)

    def run(
        self,
        forward: Callable[[Batch], "Tensor"],
        batches: Iterable[Batch],
        shape: tuple[int, int],
    ) -> NDArray[np.float16]:
        """forward(batch) [B, D] fp16 of every batch, at its positions in an array of zeros [N, D];
        D is shape[1]."""
        import torch

        with torch.inference_mode():
            out = torch.zeros(shape, dtype=torch.float16, device=self._device)

        copies = torch.cuda.Stream(self._device) if self._cuda else None

        def step(batch: Batch) -> None:
            with torch.inference_mode():
                moved = self._moved(batch, copies)
                out.index_copy_(0, moved.where, forward(moved))

        with self._threads() as threads:
            for _ in ahead(step, batches, threads) if threads > 1 else map(step, batches):
                pass
        return self._to_host(out)

    @contextmanager
    def _threads(self) -> Iterator[int]:
        """How many batches are computed at once; inside, torch uses one thread for each."""
        import torch

        if self._device.type != "cpu":
            yield 1
            return
        with _CPU_LOCK:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                yield threads
            finally:
                torch.set_num_threads(threads)

    def _moved(self, batch: Batch, copies: Any) -> Batch:
        """The batch on the device, copied on the stream `copies` if there is one."""
        if copies is None:
            return self._on_device(batch)
        import torch

        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(copies):
            moved = self._on_device(batch)
        computing.wait_stream(copies)
        for part in (moved.where, moved.ids, moved.mask):
            part.record_stream(computing)
        return moved

    def _on_device(self, batch: Batch) -> Batch:
        parts = (batch.where, batch.ids, batch.mask)
        return Batch(*(part.to(self._device, non_blocking=True) for part in parts))

    def _to_host(self, out: "Tensor") -> NDArray[np.float16]:
        import torch

        if not self._cuda:
            return out.cpu().numpy()
        host = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
        host.copy_(out, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return host.numpy()
