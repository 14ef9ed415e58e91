"""Neighbors of the chunks that sequences in progress complete with the tokens about to be read: one
call for all that ask the same retriever for as many neighbors.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from model.decoding_pass import ChunkNeighbors
from model.retriever import Neighbor, Neighbors, Retriever

Asking = TypeVar("Asking", bound=Hashable)


@dataclass(frozen=True)
class ChunkQuery(Generic[Asking]):
    """A chunk to retrieve for: its tokens, pads included, and its number in the sequence."""

    sequence: Asking
    chunk: int
    tokens: list[int]
    retriever: Retriever
    neighbors: int


@dataclass(frozen=True)
class ChunkAnswer:
    """For the model, and for people."""

    encoder_input: ChunkNeighbors
    found: tuple[Neighbor, ...]


class RetrievalFailedError(RuntimeError):
    """A retriever raised (the cause) or answered with arrays of another shape than asked for.

    Attributes:
        sequences: Those that cannot go on.
    """

    def __init__(self, message: str, sequences: Iterable[object]) -> None:
        super().__init__(message)
        self.sequences = tuple(dict.fromkeys(sequences))


def retrieve_chunks(
    queries: Iterable[ChunkQuery[Asking]],
) -> dict[Asking, dict[int, ChunkAnswer]]:
    """The answers, by sequence and chunk.

    Raises:
        RetrievalFailedError: naming all sequences of the first call that failed.
    """
    groups: dict[tuple[int, int], list[ChunkQuery[Asking]]] = {}
    for query in queries:
        groups.setdefault((id(query.retriever), query.neighbors), []).append(query)
    answers: dict[Asking, dict[int, ChunkAnswer]] = {}
    for group in groups.values():
        try:
            found = _ask(group)
        except Exception as error:
            message = f"retrieval for {len(group)} chunks failed: {error}"
            raise RetrievalFailedError(message, (q.sequence for q in group)) from error
        for i, query in enumerate(group):
            neighbors = ChunkNeighbors(found.tokens[i], found.mask[i])
            answer = ChunkAnswer(neighbors, tuple(found.found[i]))
            answers.setdefault(query.sequence, {})[query.chunk] = answer
    return answers


def _ask(group: list[ChunkQuery[Asking]]) -> Neighbors:
    chunks = np.asarray([query.tokens for query in group], np.int64)
    most = group[0].neighbors
    found = group[0].retriever.retrieve(chunks, most)
    expected = (len(chunks), most, 2 * chunks.shape[1])
    shapes = {found.tokens.shape, found.mask.shape, (len(found.found), *expected[1:])}
    if shapes != {expected}:
        raise ValueError(
            f"the retriever answered with tokens {list(found.tokens.shape)}, mask "
            f"{list(found.mask.shape)} and {len(found.found)} lists; expected {list(expected)}"
        )
    return found
