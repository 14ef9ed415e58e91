"""Copy warm-up: synthetic samples whose next chunk stands in a neighbor, so that attending to
neighbors pays at once.

Real text rewards copying so rarely at first that chunked cross-attention may never learn it. Here
tokens are random, so nothing but a neighbor can predict them: one neighbor of chunk u is chunk u
followed by chunk u + 1 (first at the same position, later shifted), the others are random.
"""

import numpy as np
from numpy.typing import NDArray

from model.samples import Batch


def copy_batch(
    sample_numbers: NDArray[np.int64],
    seq_length: int,
    chunk_size: int,
    neighbors: int,
    tokens: NDArray[np.int64],
    max_shift: int,
    seed: int,
) -> Batch:
    """Samples [B] made from their numbers alone, so that a resumed run sees the same ones.

    Args:
        tokens: The ids to draw from (no special tokens).
        max_shift: The copied continuation is moved by up to this many tokens, 0: aligned.
    """
    parts = [
        _sample(int(n), seq_length, chunk_size, neighbors, tokens, max_shift, seed)
        for n in sample_numbers
    ]
    streams, neighbor_tokens = (np.stack(part) for part in zip(*parts, strict=True))
    batch, chunks = len(parts), seq_length // chunk_size
    loss_mask = np.zeros((batch, seq_length), np.bool_)
    loss_mask[:, chunk_size - 1 :] = True
    return Batch(
        tokens=streams[:, :-1],
        labels=streams[:, 1:],
        tokens_mask=np.ones((batch, seq_length), np.bool_),
        loss_mask=loss_mask,
        neighbors=neighbor_tokens,
        neighbors_mask=np.ones((batch, chunks, neighbors, 2 * chunk_size), np.bool_),
    )


def _sample(
    number: int,
    length: int,
    m: int,
    neighbors: int,
    tokens: NDArray[np.int64],
    max_shift: int,
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Stream [S + 1] and neighbors [C, K, 2 M] of one sample."""
    random = np.random.default_rng((seed, number))
    chunks = length // m
    stream = random.choice(tokens, (chunks + 1) * m)
    found = random.choice(tokens, (chunks, neighbors, 2 * m))
    for u in range(chunks):
        shift = int(random.integers(-max_shift, max_shift + 1))
        source = stream[u * m : (u + 2) * m]
        target = found[u, random.integers(neighbors)]
        if shift >= 0:
            target[shift:] = source[: 2 * m - shift]
        else:
            target[:shift] = source[-shift:]
    return stream[: length + 1], found
