"""The order of training samples: a seeded permutation of each epoch, computed sample by sample,
without index files.

A Feistel network permutes 0 .. 4^b - 1 for the smallest such power that covers the epoch; values
outside the epoch are permuted again until they fall inside (cycle walking). The state of a run's
data is one integer: samples consumed.
"""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


def sample_ids(places: NDArray[np.int64], num_samples: int, seed: int) -> NDArray[np.int64]:
    """[n] the samples at `places` [n] of the endless sequence of shuffled epochs.

    Raises:
        ValueError: there are no samples.
    """
    if num_samples < 1:
        raise ValueError("no training samples: the dataset is empty")
    epochs, inside = np.divmod(places, num_samples)
    out = np.empty(len(places), np.int64)
    for epoch in np.unique(epochs):
        where = epochs == epoch
        out[where] = permute(inside[where], num_samples, seed, int(epoch))
    return out


def permute(values: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Images of `values` under the permutation of 0 .. size - 1 that (seed, epoch) names."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.random.default_rng((seed, epoch)).integers(0, 2**63, _ROUNDS, dtype=np.uint64)
    out = _feistel(values.astype(np.uint64), half_bits, keys)
    while (outside := out >= size).any():
        out[outside] = _feistel(out[outside], half_bits, keys)
    return out.astype(np.int64)


def _feistel(
    values: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (mix64(right ^ key) & mask)
    return (left << shift) | right


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: a hash of 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
