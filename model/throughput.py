"""How fast a run trains: rates over the steps since the last report, of this rank's device and of
all ranks."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Dense bf16 products, in 10^12 operations a second, as the vendors publish them.
_PEAK_TFLOPS = {
    r"H100 PCIe": 756.0,
    r"H100 NVL": 835.0,
    r"H100|H200|H800|GH200": 989.0,
    r"\bB200": 2250.0,
    r"A100|A800": 312.0,
    r"L40S": 362.0,
    r"\bL4\b": 121.0,
    r"A10G": 70.0,
    r"\bA10\b": 125.0,
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Operations a second that a device can do at most in a precision; None if that is not
    known."""
    if precision == "bf16":
        for pattern, tflops in _PEAK_TFLOPS.items():
            if re.search(pattern, device_name):
                return tflops * 1e12
    return None


class Throughput:
    """Collects the time of steps and what they did.

    Args:
        flops_per_sample: Of a forward and a backward pass with neighbors, and without; None where
            it is not known, as with frozen parameters.
        peak: Operations a second of a device at most; None: unknown.
    """

    def __init__(
        self,
        world_size: int,
        device: str,
        flops_per_sample: tuple[float, float] | None,
        peak: float | None,
    ) -> None:
        self.world_size, self.device = world_size, device
        self.flops_per_sample, self.peak = flops_per_sample, peak
        self.seconds = 0.0
        self._clear()

    def _clear(self) -> None:
        self._seconds = self._waited = 0.0
        self._tokens = self._neighbor_tokens = 0
        self._flops = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self._seconds += elapsed
        self.seconds += elapsed

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For data, within a step."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def count(self, samples: int, tokens: int, neighbor_tokens: int) -> None:
        """What a step did on all ranks together, pads included."""
        self._tokens += tokens
        self._neighbor_tokens += neighbor_tokens
        if self.flops_per_sample is not None:
            with_neighbors, without = self.flops_per_sample
            self._flops += samples * (with_neighbors if neighbor_tokens else without)

    def report(self) -> dict[str, Any]:
        """Rates since the last report: tokens_per_s and neighbor_tokens_per_s of all ranks;
        tflops_per_device and mfu (null where the operations or the hardware are not known);
        data_wait, the share of the time; memory_bytes, the most so far."""
        per_s = 1 / max(self._seconds, 1e-9)
        rate = None
        if self.flops_per_sample is not None:
            rate = self._flops * per_s / self.world_size
        values = {
            "tokens_per_s": self._tokens * per_s,
            "neighbor_tokens_per_s": self._neighbor_tokens * per_s,
            "tflops_per_device": None if rate is None else rate / 1e12,
            "mfu": rate / self.peak if rate is not None and self.peak is not None else None,
            "data_wait": self._waited * per_s,
            "memory_bytes": peak_memory(self.device),
        }
        self._clear()
        return values


def peak_memory(device: str) -> int:
    """Bytes at most so far: allocated on the GPU, or resident of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as file:
        [line] = [line for line in file if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
