"""Batches of the first steps of a run, in which only copying from neighbors lowers the loss."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from model.samples import Batch


def only_copies(batch: Batch) -> Batch:
    """The same batch, counting only labels that stand in a neighbor their position can attend to:
    one of the last completed chunk."""
    assert batch.neighbors is not None
    assert batch.neighbors_mask is not None
    size, chunks, chunk_size = *batch.neighbors.shape[:2], batch.neighbors.shape[-1] // 2
    found = np.where(batch.neighbors_mask, batch.neighbors, -1).astype(np.int32)
    # The labels at the positions that attend to each chunk: from its last position on.
    attending = np.full((size, chunks * chunk_size), -2, np.int32)
    count = batch.labels.shape[1] - (chunk_size - 1)
    attending[:, :count] = batch.labels[:, chunk_size - 1 :]
    found_BCN1 = found.reshape(size, chunks, -1, 1)
    is_copy = (found_BCN1 == attending.reshape(size, chunks, 1, chunk_size)).any(axis=2)
    held = np.zeros_like(batch.loss_mask)
    held[:, chunk_size - 1 :] = is_copy.reshape(size, -1)[:, :count]
    return replace(batch, loss_mask=batch.loss_mask & held)


def random_copies(
    places: NDArray[np.int64],
    seed: int,
    vocabulary: NDArray[np.integer],
    seq_length: int,
    chunk_size: int,
    neighbors: int,
) -> Batch:
    """Samples of random tokens: nothing tells the next one but a neighbor, whatever the tokens.

    The first neighbor of a chunk is the sample's own text from up to half a chunk before or after
    the chunk's start, so that places say little; the others are random too.

    Args:
        places: [B] of the samples in the run; with the seed they determine the tokens.
        vocabulary: Token ids to draw from.
    """
    chunks, half = seq_length // chunk_size, chunk_size // 2
    first = half + np.arange(chunks)[:, None] * chunk_size + np.arange(2 * chunk_size)
    streams, found = [], []
    for place in places:
        rng = np.random.default_rng([seed, place])
        stream = rng.choice(vocabulary, seq_length + 2 * chunk_size)
        moved = rng.integers(-half, half, (chunks, 1), endpoint=True)
        others = rng.choice(vocabulary, (chunks, neighbors - 1, 2 * chunk_size))
        streams.append(stream[half:][: seq_length + 1])
        found.append(np.concatenate([stream[first + moved][:, None], others], axis=1))
    text, neighbors_BCKR = np.stack(streams), np.stack(found).astype(np.int32)
    everywhere = np.ones((len(places), seq_length), np.bool_)
    batch = Batch(
        tokens=text[:, :-1].astype(np.int32),
        labels=text[:, 1:].astype(np.int64),
        tokens_mask=everywhere,
        loss_mask=everywhere,
        neighbors=neighbors_BCKR,
        neighbors_mask=np.ones(neighbors_BCKR.shape, np.bool_),
    )
    return only_copies(batch)
