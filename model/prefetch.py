"""Batches made ahead of their steps by a thread, on their way to the device while it computes."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import torch

from model.samples import Batch, TensorBatch

_DEPTH = 2


@dataclass(frozen=True)
class StepBatches:
    """What one rank computes in a step.

    Attributes:
        valid: Labels that count.
    """

    batches: list[TensorBatch]
    valid: int

    @classmethod
    def of(cls, batches: list[Batch], device: torch.device) -> Self:
        valid = sum(int(batch.loss_mask.sum()) for batch in batches)
        return cls([batch.to(device) for batch in batches], valid)


def _use(device: torch.device) -> None:
    """Which GPU is the current one is a matter of each thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


class Prefetcher:
    """The batches of consecutive steps.

    Args:
        make: The batches of a step, given its number; runs in another thread, step after step.
    """

    def __init__(
        self, make: Callable[[int], list[Batch]], device: torch.device, first: int, stop: int
    ) -> None:
        self._make, self._device, self._next, self._stop = make, device, first, stop
        self._pool = ThreadPoolExecutor(1, "batches", _use, (device,))
        self._made: deque[Future[StepBatches]] = deque()
        self._order()

    def _order(self) -> None:
        while len(self._made) < _DEPTH and self._next < self._stop:
            self._made.append(self._pool.submit(self._work, self._next))
            self._next += 1

    def _work(self, step: int) -> StepBatches:
        return StepBatches.of(self._make(step), self._device)

    def take(self) -> StepBatches:
        """Those of the next step; an error of making them is raised here."""
        made = self._made.popleft().result()
        self._order()
        return made

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
