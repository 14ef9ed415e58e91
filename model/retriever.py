"""What generation asks for neighbors: the protocol between the model and whatever retrieves.

The model knows nothing of indexes; `serving/` implements the protocol. numpy only.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Neighbor:
    """A retrieved chunk with its continuation, as it is shown to people.

    Attributes:
        id: Chunk id in the service that found it.
        service: Name of that service: static, dynamic.
        text: Of chunk and continuation, specials dropped.
        source: Where its document comes from.
        score: Inner product of the unit vectors of the query and the chunk.
    """

    id: int
    service: str
    text: str
    source: str
    score: float


@dataclass(frozen=True)
class Neighbors:
    """Neighbors of C chunks, best first.

    Attributes:
        tokens: [C, K, 2 chunk_size] chunk and continuation; pads where there are none.
        mask: [C, K, 2 chunk_size] False on pads and on missing neighbors.
        found: For each chunk its neighbors, at most K; missing ones are not in it.
    """

    tokens: NDArray[np.int64]
    mask: NDArray[np.bool_]
    found: tuple[tuple[Neighbor, ...], ...]


class Retriever(Protocol):
    """Finds neighbors of chunks that were just written."""

    def is_empty(self) -> bool:
        """Whether there is nothing to find: retrieval is off then."""
        ...

    def retrieve(self, chunks: NDArray[np.int64], neighbors: int) -> Neighbors:
        """The best `neighbors` of each of chunks [C, chunk_size]."""
        ...
