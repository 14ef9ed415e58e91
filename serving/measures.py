"""What a server measures about itself, for `GET /metrics` in Prometheus' text format.

A registry of its own; safe for threads.
"""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from model.retriever import Neighbors, Retriever

_SHORT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_LONG_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Measures:
    """Counters and times of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "retromill_requests",
            "Answered requests by route and HTTP status; 499: the client left first",
            ["route", "status"],
            registry=self.registry,
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts taken in")
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated")
        self.refused = self._counter("refused", "Sequences refused because the queue was full")
        self.cancelled = self._counter("cancelled", "Sequences ended before their last token")
        self.first_token_s = self._histogram(
            "time_to_first_token", "From a request's arrival to its first token", _LONG_S
        )
        self.sequence_s = self._histogram(
            "sequence", "From a request's arrival to a sequence's last token", _LONG_S
        )
        self.step_s = self._histogram(
            "step", "One token of all sequences in progress, retrieval included", _SHORT_S
        )
        self.retrieval_s = self._histogram(
            "retrieval", "One call of the retrieval services during generation", _SHORT_S
        )

    def observe(self, name: str, description: str, read: Callable[[], float]) -> None:
        """A gauge whose value is read when it is asked for."""
        gauge = Gauge(f"retromill_{name}", description, registry=self.registry)
        gauge.set_function(read)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, description: str) -> Counter:
        return Counter(f"retromill_{name}", description, registry=self.registry)

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"retromill_{name}_seconds", description, buckets=buckets, registry=self.registry
        )


class MeasuredRetriever:
    """A retriever of one sequence, timed. A decoder batches calls to one object only; with one for
    each sequence, what a sequence retrieves is a function of its own chunks, to the last bit."""

    def __init__(self, retriever: Retriever, measures: Measures) -> None:
        self._retriever, self._measures = retriever, measures

    def is_empty(self) -> bool:
        return self._retriever.is_empty()

    def retrieve(self, chunks: NDArray[np.int64], neighbors: int) -> Neighbors:
        """The best `neighbors` of each of chunks [C, chunk_size]."""
        start = time.perf_counter()
        try:
            return self._retriever.retrieve(chunks, neighbors)
        finally:
            self._measures.retrieval_s.observe(time.perf_counter() - start)
