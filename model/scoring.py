"""Which tokens of a held-out dataset count in an evaluation: those of some sources, those of an
answer. numpy only."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from etl.dataset import Dataset


def scored_tokens(
    dataset: Dataset, token_bytes: Sequence[bytes], sources: str | None, answer_pattern: str | None
) -> NDArray[np.bool_]:
    """[num_chunks * chunk_size] over the dataset's token stream.

    Args:
        token_bytes: The bytes each token id stands for.
        sources: Count documents whose source file's name contains this; None: all.
        answer_pattern: Count tokens that overlap group 1 of a match in the document's text; None:
            all.

    Raises:
        ValueError: the pattern is not a regular expression with a group.
    """
    pattern = _compile(answer_pattern)
    names = dataset.manifest.sources
    chosen = np.asarray([sources is None or sources in name for name in names])[
        dataset.documents["source"]
    ]
    first = dataset.document_first_chunk * dataset.chunk_size
    scored = np.zeros(int(first[-1]), np.bool_)
    for d in np.flatnonzero(chosen):
        if pattern is None:
            scored[first[d] : first[d + 1]] = True
        else:
            ids = np.arange(first[d], first[d + 1], dataset.chunk_size) // dataset.chunk_size
            tokens = dataset.get_chunk(ids).ravel()
            scored[first[d] : first[d + 1]] = _matching([token_bytes[t] for t in tokens], pattern)
    return scored


def token_byte_counts(dataset: Dataset, token_bytes: Sequence[bytes]) -> NDArray[np.float64]:
    """[num_chunks * chunk_size] bytes of text that each token of the dataset's stream stands for.

    Those of a chunk add up to what preparation recorded for it: for byte-level tokenizers every
    token's own bytes, for others in proportion to their pieces.
    """
    lengths = np.asarray([len(piece) for piece in token_bytes], np.float64)
    ids = np.arange(dataset.num_chunks)
    counts = lengths[dataset.get_chunk(ids, continuation=False)]
    totals = counts.sum(axis=1, keepdims=True)
    recorded = dataset.chunk_bytes(ids)[:, None]
    return (counts * recorded / np.maximum(totals, 1)).ravel()


def _compile(pattern: str | None) -> re.Pattern[bytes] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern.encode())
    except re.error as error:
        raise ValueError(
            f"answer_pattern {pattern!r} is not a regular expression: {error}"
        ) from None
    if compiled.groups < 1:
        raise ValueError(f"answer_pattern {pattern!r} has no group; put the answer in parentheses")
    return compiled


def _matching(pieces: list[bytes], pattern: re.Pattern[bytes]) -> NDArray[np.bool_]:
    """[len(pieces)] which pieces overlap group 1 of a match in the joined text."""
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = ends - [len(piece) for piece in pieces]
    hit = np.zeros(len(pieces), np.bool_)
    for match in pattern.finditer(b"".join(pieces)):
        hit |= (starts < match.end(1)) & (ends > match.start(1)) & (ends > starts)
    return hit
