"""Several training datasets as one endless sequence of samples, each with its share.

Between `model/samples.py`, which reads the samples of one dataset, and the trainer, which asks for
places of the sequence. A place is turned into a dataset and a sample by arithmetic alone: there are
no index files and there is no state, so a run is taken up anywhere.

A fixed pattern of 65536 slots repeats for ever. A dataset has as many of them as its weight asks
for, at even distances, and its samples fill them in its own shuffled order, epoch after epoch.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.sampler import sample_ids
from model.samples import Batch, SampleError, SampleReader

SLOTS = 1 << 16

_ALIKE: dict[str, Callable[[SampleReader], Any]] = {
    "seq_length": lambda reader: reader.seq_length,
    "neighbors": lambda reader: reader.neighbors,
    "chunk_size": lambda reader: reader.dataset.chunk_size,
    "pad_id": lambda reader: reader.dataset.manifest.pad_id,
    "vocab_size": lambda reader: reader.dataset.manifest.vocab_size,
}


class MixtureError(SampleError):
    """Datasets or weights that make no mixture."""


class Mixture:
    """The samples of one or more readers, in shares.

    With one reader, place n is `sample_ids` of n. Reader d is shuffled by seed + d.

    Args:
        weights: One for each reader, of any sum; by default their numbers of samples.

    Raises:
        MixtureError: no readers, readers that differ in what a batch must have in common, weights
            that are not one for each reader or negative, or one too small for a slot.
    """

    def __init__(
        self, readers: Sequence[SampleReader], weights: Sequence[float] | None, seed: int
    ) -> None:
        if not readers:
            raise MixtureError("no readers to mix; expected at least one")
        for reader in readers[1:]:
            _check_alike(readers[0], reader)
        self.readers, self._seed = tuple(readers), seed
        if weights is None:
            weights = [reader.num_samples for reader in readers]
        self._counts = _slot_counts(weights, [reader.dataset.url for reader in readers])
        self._pattern, self._ranks = _pattern(self._counts)

    @property
    def seq_length(self) -> int:
        return self.readers[0].seq_length

    @property
    def chunk_size(self) -> int:
        return self.readers[0].dataset.chunk_size

    @property
    def neighbors(self) -> int:
        """Neighbors of each chunk; 0 without retrieval."""
        return self.readers[0].neighbors

    @property
    def num_samples(self) -> int:
        """Samples of all readers together."""
        return sum(reader.num_samples for reader in self.readers)

    def where(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[count] numbers of the readers, and of the samples in them, at places first .. first +
        count - 1."""
        rounds, slots = np.divmod(np.arange(first, first + count, dtype=np.int64), SLOTS)
        readers = self._pattern[slots]
        inner = rounds * self._counts[readers] + self._ranks[slots]
        samples = np.empty(count, np.int64)
        for d in np.unique(readers).tolist():
            own = readers == d
            samples[own] = sample_ids(inner[own], self.readers[d].num_samples, self._seed + d)
        return readers, samples

    def read(self, first: int, count: int) -> Batch:
        """The samples at places first .. first + count - 1, in this order."""
        readers, samples = self.where(first, count)
        present = np.unique(readers).tolist()
        if len(present) == 1:
            return self.readers[present[0]].read(samples)
        owned = [readers == d for d in present]
        parts = [self.readers[d].read(samples[own]) for d, own in zip(present, owned)]
        return Batch(**{f.name: _interleaved(f.name, owned, parts) for f in fields(Batch)})


def _check_alike(one: SampleReader, other: SampleReader) -> None:
    for name, value in _ALIKE.items():
        if value(one) != value(other):
            raise MixtureError(
                f"{other.dataset.url} has {name} {value(other)}, {one.dataset.url} has "
                f"{value(one)}; datasets of one mixture have the same"
            )


def _slot_counts(weights: Sequence[float], names: Sequence[str]) -> NDArray[np.int64]:
    """[D] slots of each weight, SLOTS together; those left over by rounding down go to the largest
    remainders."""
    total = sum(weights)
    valid = all(weight >= 0 for weight in weights) and 0 < total < inf
    if len(weights) != len(names) or not valid:
        raise MixtureError(
            f"weights are {list(weights)}; expected {len(names)} of them from 0 up, not all 0"
        )
    shares = np.asarray(weights, np.float64) / total * SLOTS
    counts = np.floor(shares).astype(np.int64)
    missing = SLOTS - int(counts.sum())
    counts[np.argsort(counts - shares, kind="stable")[:missing]] += 1
    for name, weight, count in zip(names, weights, counts):
        if weight > 0 and count == 0:
            raise MixtureError(
                f"{name} has weight {weight} of {total}; the smallest possible is "
                f"{total / SLOTS}, one slot of {SLOTS}. Give it more, or 0"
            )
    return counts


def _pattern(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[SLOTS] the dataset of each slot, and how many earlier slots are of the same dataset."""
    ranks = np.concatenate([np.arange(count) for count in counts])
    owners = np.repeat(np.arange(len(counts)), counts)
    order = np.argsort((ranks + 0.5) / counts[owners], kind="stable")
    return owners[order], ranks[order]


def _interleaved(name: str, owned: list[NDArray[np.bool_]], parts: list[Batch]) -> Any:
    """One field of batches as one array; the rows of each part go where its mask is true."""
    values = [getattr(part, name) for part in parts]
    if values[0] is None:
        return None
    out = np.empty((len(owned[0]), *values[0].shape[1:]), values[0].dtype)
    for own, value in zip(owned, values):
        out[own] = value
    return out
