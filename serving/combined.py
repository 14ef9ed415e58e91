"""Several retrieval services as one, each with a weight.

Scores of all services are inner products of unit vectors of one embedder, so they can be compared:
neighbors are merged by score * weight. With equal weights that is what one index over everything
would find. NeMo's combined service fills fixed shares of the K places by weight instead, so that a
poor neighbor of one service stands before a good one of another; here a weight says how much more
alike a chunk of that service has to be.

    weight 0          the service is not asked
    a negative score  is divided by the weight: less weight never ranks higher
    ties              by the order of the services, then by chunk id
    equal chunks      chunk and continuation that two services hold are shown once, as the better
                      ranked; the place goes to the next best
"""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.retriever import Neighbor, Neighbors
from serving.chunk_rules import ChunkRules
from serving.embedding import TextEmbedder
from serving.service import RetrievalService, check_count, no_neighbors, query_texts


@dataclass(frozen=True)
class _Asked:
    """A service's answer."""

    name: str
    weight: float
    answer: Neighbors

    def candidates(self, c: int) -> "list[_Candidate]":
        """Those of chunk c."""
        return [
            _Candidate(
                _weighted(neighbor.score, self.weight),
                replace(neighbor, service=self.name),
                self.answer.tokens[c, k],
            )
            for k, neighbor in enumerate(self.answer.found[c])
        ]


class _Candidate(NamedTuple):
    weighted: float
    neighbor: Neighbor
    tokens: NDArray[np.int64]


class CombinedRetriever:
    """Thread-safe.

    Args:
        services: By name; their order breaks ties.
        weights: By name, 1 where none is given.

    Raises:
        ValueError: no services, a weight that cannot be, or services with different tokenizers,
            chunk sizes or embedders.
    """

    def __init__(
        self, services: Mapping[str, RetrievalService], weights: Mapping[str, float] | None = None
    ) -> None:
        _check_alike(services)
        self.services = dict(services)
        first = next(iter(self.services.values()))
        self.rules: ChunkRules = first.rules
        self.embedder: TextEmbedder = first.embedder
        self._changing = threading.Lock()
        self._weights = dict.fromkeys(self.services, 1.0)
        self.set_weights(weights or {})

    @property
    def weights(self) -> dict[str, float]:
        """By name of the service (a copy)."""
        return dict(self._weights)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Changes some of the weights, all of those at once; requests that have begun keep theirs.

        Raises:
            ValueError: an unknown service, or a weight that is negative or not finite; then none is
                changed.
        """
        for name, weight in weights.items():
            if name not in self.services:
                raise ValueError(
                    f"weight of {name!r}, but the services are {', '.join(self.services)}"
                )
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"the weight of {name} is {weight}; expected a number, 0 or more")
        with self._changing:
            self._weights = {**self._weights, **weights}

    def is_empty(self) -> bool:
        """Whether no service that has a weight holds anything."""
        return not self._with_weight(self._weights)

    def pinned(self) -> "CombinedRetriever":
        """The services and weights as they are now."""
        weights = self._weights
        services = {name: service.pinned() for name, service in self.services.items()}
        return CombinedRetriever(services, weights)

    def retrieve(self, chunks: NDArray[np.int64], neighbors: int) -> Neighbors:
        """The best `neighbors` of each of chunks [C, chunk_size]; fewer where services hold the
        same chunks.

        Raises:
            ValueError: chunks of another shape, or neighbors below 1.
        """
        return self.query(query_texts(chunks, self.rules), neighbors)

    def query(self, texts: Sequence[str], neighbors: int) -> Neighbors:
        """The best `neighbors` of each text, which is embedded as it is.

        Raises:
            ValueError: neighbors below 1.
        """
        check_count(neighbors)
        weights = self._weights
        asked = [
            _Asked(name, weights[name], self.services[name].query(texts, neighbors))
            for name in self._with_weight(weights)
        ]
        merged = no_neighbors(self.rules, len(texts), neighbors)
        found = []
        for c in range(len(texts)):
            best = _best([x for part in asked for x in part.candidates(c)], neighbors)
            for k, candidate in enumerate(best):
                merged.tokens[c, k] = candidate.tokens
            found.append(tuple(candidate.neighbor for candidate in best))
        return Neighbors(merged.tokens, merged.tokens != self.rules.pad_id, tuple(found))

    def _with_weight(self, weights: Mapping[str, float]) -> list[str]:
        """Names of the services that are to be asked."""
        return [
            name
            for name, service in self.services.items()
            if weights[name] > 0 and not service.is_empty()
        ]


def _weighted(score: float, weight: float) -> float:
    return score * weight if score >= 0 else score / weight


def _best(candidates: list[_Candidate], count: int) -> list[_Candidate]:
    """The first `count`, without what another service's better one repeats. Equal scores keep their
    order, which is that of services, and inside of them of ids."""
    holders: dict[bytes, str] = {}
    kept = []
    for candidate in sorted(candidates, key=lambda each: -each.weighted):
        name = candidate.neighbor.service
        if holders.setdefault(candidate.tokens.tobytes(), name) == name:
            kept.append(candidate)
    return kept[:count]


def _check_alike(services: Mapping[str, RetrievalService]) -> None:
    if not services:
        raise ValueError("no services to combine; expected at least one")
    facts = {name: _facts(service) for name, service in services.items()}
    if len(set(facts.values())) > 1:
        shown = "; ".join(f"{name}: {found}" for name, found in facts.items())
        raise ValueError(
            f"services differ in (tokenizer, chunk_size, pad id, embedder): {shown}; open them "
            "with the same"
        )


def _facts(service: RetrievalService) -> tuple[str, int, int, str]:
    rules = service.rules
    tokenizer = rules.tokenizer.fingerprint
    return tokenizer, rules.chunk_size, rules.pad_id, service.embedder.fingerprint()
