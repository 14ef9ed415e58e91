"""One consistent state of the live documents: exact search over their stored vectors, and nothing
that ever changes.

The vectors go through the same search and ranking as an index's (`indexing/neighbors.py`), block by
block. Snapshots share memory: rows are only ever appended behind those of earlier snapshots.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexing.embeddings import Embeddings
from indexing.exact_search import BlockSearcher
from indexing.neighbors import Block, NeighborFinder
from serving.chunk_rules import ChunkRules
from serving.embedding import TextEmbedder
from serving.service import ChunkService, source_name

_BLOCK_CHUNKS = 1 << 14
_MARGIN = 16
NAME = "dynamic"


@dataclass(frozen=True)
class LiveDocument:
    """A document that was added while the server runs.

    Attributes:
        id: Number in the order of addition, from 0.
        text: As it was embedded: mended, if that was asked for.
        name: The record's own id.
        src: Where it comes from.
        title: Of the document.
        metadata: The record's other fields, as they came.
        num_tokens: End-of-document included, without pads.
        num_chunks: Of the document.
    """

    id: int
    text: str
    name: str | None
    src: str | None
    title: str | None
    metadata: Mapping[str, Any]
    num_tokens: int
    num_chunks: int

    @property
    def source(self) -> str:
        """As it is shown beside neighbors."""
        return source_name(self.src, self.title or self.name) or f"live document {self.id}"


class GrowingRows:
    """An array of rows [n, width] that grows at its end; earlier views stay as they are."""

    def __init__(self, width: int, dtype: np.dtype[Any]) -> None:
        self._rows = np.empty((0, width), dtype)

    def first(self, count: int) -> NDArray[Any]:
        """A read-only view of the first rows."""
        view = self._rows[:count]
        view.flags.writeable = False
        return view

    def put(self, start: int, rows: NDArray[Any]) -> NDArray[Any]:
        """Puts rows behind the first `start`, which stay; a read-only view of them all."""
        stop = start + len(rows)
        if stop > len(self._rows):
            width = self._rows.shape[1]
            grown = np.empty((max(stop, 2 * len(self._rows)), width), self._rows.dtype)
            grown[:start] = self._rows[:start]
            self._rows = grown
        self._rows[start:stop] = rows
        return self.first(stop)


class _VectorsInMemory(Embeddings):
    """Vectors [M, D] as blocks of embeddings that lie in no file."""

    def __init__(self, vectors: NDArray[np.float16]) -> None:
        sizes = {"num_chunks": len(vectors), "dimension": vectors.shape[1]}
        super().__init__("live documents", {**sizes, "block_chunks": _BLOCK_CHUNKS, "blocks": []})
        self._vectors = vectors

    def block(self, i: int) -> NDArray[np.float16]:
        return self._vectors[i * self.block_chunks : (i + 1) * self.block_chunks]


class LiveSnapshot(ChunkService):
    """The documents of one generation.

    Args:
        generation: Rises with every change of the documents.
        tokens: [M, 2 chunk_size] of all chunks, with continuations.
        vectors: [M, D] of all chunks; zeros for those without text, which are never found.
        owners: [M, 1] id of the document of each chunk.
    """

    name = NAME

    def __init__(
        self,
        rules: ChunkRules,
        embedder: TextEmbedder,
        generation: int,
        documents: tuple[LiveDocument, ...],
        tokens: NDArray[Any],
        vectors: NDArray[np.float16],
        owners: NDArray[np.int64],
    ) -> None:
        self.rules, self.embedder, self.generation = rules, embedder, generation
        self.documents = documents
        self.vectors = vectors
        self._tokens, self._owners = tokens, owners[:, 0]
        stored = _VectorsInMemory(vectors)
        searcher = BlockSearcher(stored, len(vectors))
        self._finder = NeighborFinder(searcher, stored.rows, self._keys, _MARGIN)

    @property
    def num_chunks(self) -> int:
        return len(self._owners)

    def is_empty(self) -> bool:
        return not self.documents

    def pinned(self) -> "LiveSnapshot":
        return self

    def find(self, vectors: NDArray[np.float16], neighbors: int) -> Block:
        """(chunk ids, exact scores), both [C, K], ordered by score, then id."""
        return self._finder.find(vectors, neighbors, None)

    def chunks_with_continuations(self, chunk_ids: NDArray[np.int64]) -> NDArray[Any]:
        return self._tokens[chunk_ids]

    def sources(self, chunk_ids: NDArray[np.int64]) -> list[str]:
        return [self.documents[i].source for i in self._owners[chunk_ids].tolist()]

    def _keys(self, chunk_ids: NDArray[np.int64]) -> NDArray[np.uint64]:
        """[N, 2] the document twice: it is its own cluster of near-duplicates."""
        return np.repeat(self._owners[chunk_ids].astype(np.uint64)[:, None], 2, axis=1)
