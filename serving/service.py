"""What every retrieval service does: text of a chunk -> vector -> chunk ids, best first -> tokens
for the model and text for people.

Implements `model/retriever.py`; the services differ in where vectors and tokens lie.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from indexing.embeddings import chunk_texts
from indexing.knn_map import NO_NEIGHBOR
from indexing.neighbors import Block
from model.retriever import Neighbor, Neighbors, Retriever
from serving.chunk_rules import ChunkRules
from serving.embedding import TextEmbedder


class RetrievalService(Retriever, Protocol):
    """A `Retriever` that also answers texts, and can be held still for the time of a request."""

    @property
    def rules(self) -> ChunkRules: ...

    @property
    def embedder(self) -> TextEmbedder: ...

    def query(self, texts: Sequence[str], neighbors: int) -> Neighbors:
        """The best `neighbors` of each text, which is embedded as it is."""
        ...

    def pinned(self) -> "RetrievalService":
        """The service as it is now: no later change shows in what it answers."""
        ...


class ChunkService(ABC):
    """The part that is the same over an index and over live documents.

    Attributes:
        name: Of the service, shown beside its neighbors.
    """

    name: str
    rules: ChunkRules
    embedder: TextEmbedder

    @abstractmethod
    def is_empty(self) -> bool:
        """Whether there is no chunk to find."""

    @abstractmethod
    def find(self, vectors: NDArray[np.float16], neighbors: int) -> Block:
        """(chunk ids, exact scores), both [C, K], of query vectors [C, D]; -1 where there are
        fewer, at the end of a row."""

    @abstractmethod
    def chunks_with_continuations(self, chunk_ids: NDArray[np.int64]) -> NDArray[Any]:
        """[N, 2 chunk_size] tokens."""

    @abstractmethod
    def sources(self, chunk_ids: NDArray[np.int64]) -> list[str]:
        """Where each chunk's document comes from."""

    def retrieve(self, chunks: NDArray[np.int64], neighbors: int) -> Neighbors:
        """The best `neighbors` of each of chunks [C, chunk_size].

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
        if self.is_empty() or not texts:
            return no_neighbors(self.rules, len(texts), neighbors)
        ids, scores = self.find(self.embedder.embed(texts), neighbors)
        return self._shown(ids, scores)

    def _shown(self, ids_CK: NDArray[np.int64], scores_CK: NDArray[np.float64]) -> Neighbors:
        is_found = ids_CK != NO_NEIGHBOR
        ids = ids_CK[is_found]
        rows = self.chunks_with_continuations(ids).astype(np.int64)
        tokens = np.full((*ids_CK.shape, rows.shape[1]), self.rules.pad_id, np.int64)
        tokens[is_found] = rows
        texts = self.rules.tokenizer.decode_batch(rows) if len(ids) else []
        parts = zip(ids.tolist(), texts, self.sources(ids), scores_CK[is_found].tolist())
        shown = [Neighbor(i, self.name, text, source, score) for i, text, source, score in parts]
        stops = np.cumsum(is_found.sum(axis=1)).tolist()
        found = tuple(tuple(shown[a:b]) for a, b in zip([0, *stops[:-1]], stops))
        return Neighbors(tokens, tokens != self.rules.pad_id, found)


def query_texts(chunks: NDArray[np.int64], rules: ChunkRules) -> list[str]:
    """The text that stands for each of chunks [C, chunk_size] in every search."""
    if chunks.ndim != 2 or chunks.shape[1] != rules.chunk_size:
        raise ValueError(
            f"chunks have shape {list(chunks.shape)}, expected [C, {rules.chunk_size}]: chunks of "
            "the chunk_size that the services were made with"
        )
    return chunk_texts(chunks, rules.tokenizer) if len(chunks) else []


def check_count(neighbors: int) -> None:
    if neighbors < 1:
        raise ValueError(f"neighbors is {neighbors}; expected at least 1")


def no_neighbors(rules: ChunkRules, chunks: int, neighbors: int) -> Neighbors:
    """Pads and masks for chunks that have none."""
    tokens = np.full((chunks, neighbors, 2 * rules.chunk_size), rules.pad_id, np.int64)
    return Neighbors(tokens, np.zeros(tokens.shape, np.bool_), ((),) * chunks)


def source_name(*parts: str | None) -> str:
    """What is known about where a document comes from, each part once, in order."""
    return ", ".join(dict.fromkeys(part for part in parts if part))
