from types import SimpleNamespace

import numpy as np
import pytest

from model.mixture import SLOTS, Mixture, MixtureError
from model.sampler import sample_ids
from model.samples import Batch, NeighborReader, SampleReader

LENGTH = 64


class Numbered:
    """A reader whose samples hold its name and their number."""

    def __init__(self, name, num_samples, **changed):
        manifest = SimpleNamespace(pad_id=0, vocab_size=100)
        self.dataset = SimpleNamespace(url=f"data-{name}", chunk_size=2, manifest=manifest)
        self.name, self.num_samples, self.seq_length, self.neighbors = name, num_samples, 4, 0
        for key, value in changed.items():
            place = {"chunk_size": self.dataset, "pad_id": manifest, "vocab_size": manifest}
            setattr(place.get(key, self), key, value)

    def read(self, samples):
        tokens = np.stack([np.full(len(samples), self.name), samples], axis=1)
        return Batch(tokens, tokens, tokens > 0, tokens > 0)


def mixture(sizes, weights=None, seed=0):
    return Mixture([Numbered(i, size) for i, size in enumerate(sizes)], weights, seed)


def test_one_reader_alone_comes_in_the_order_of_the_sampler():
    for weights in (None, [0.3]):
        readers, samples = mixture([100], weights, seed=7).where(SLOTS - 50, 300)
        assert not readers.any()
        assert np.array_equal(samples, sample_ids(np.arange(SLOTS - 50, SLOTS + 250), 100, 7))


@pytest.mark.parametrize("weights", [[1, 1], [0.9, 0.1], [0.7, 0.3], [5, 0.01]])
def test_shares_of_two_are_within_a_sample_of_the_weights_in_any_window(weights):
    readers, _ = mixture([50, 50], weights).where(SLOTS - 3000, 6000)
    for d, weight in enumerate(np.asarray(weights) / sum(weights)):
        taken = np.concatenate([[0], np.cumsum(readers == d)])
        for length in (1, 2, 10, 99, 1000):
            found = taken[length:] - taken[:-length]
            assert np.abs(found - weight * length).max() <= 1 + length / SLOTS


def test_the_order_of_datasets_never_changes():
    """A run that is taken up with another version goes on with the same samples."""
    assert mixture([9, 9], [3, 1]).where(0, 8)[0].tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
    assert mixture([9] * 3, [1, 2, 1]).where(0, 8)[0].tolist() == [1, 0, 2, 1, 1, 0, 2, 1]


def test_shares_of_many_are_near_the_weights_in_any_window_and_exact_in_a_round():
    weights = np.asarray([0.5, 0.2, 0.2, 0.07, 0.03])
    readers, _ = mixture([50] * 5, weights.tolist()).where(0, 2 * SLOTS)
    for d, weight in enumerate(weights):
        taken = np.concatenate([[0], np.cumsum(readers == d)])
        for length in (1, 10, 99, 1000):
            found = taken[length:] - taken[:-length]
            assert np.abs(found - weight * length).max() <= 2.5
        assert abs(taken[SLOTS] - weight * SLOTS) < 1
        assert taken[-1] == 2 * taken[SLOTS]


def test_samples_of_a_dataset_are_a_permutation_of_it_each_epoch():
    sizes = [37, 1000, 64]
    readers, samples = mixture(sizes, [1, 2, 3], seed=4).where(0, 3 * SLOTS)
    for d, size in enumerate(sizes):
        own = samples[readers == d]
        epochs = own[: len(own) // size * size].reshape(-1, size)
        assert len(epochs) > 1
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
        assert np.array_equal(own, sample_ids(np.arange(len(own)), size, 4 + d))


@pytest.mark.parametrize("first", [0, 17, SLOTS - 5, 3 * SLOTS + 11, 10**12])
def test_a_place_has_its_sample_wherever_reading_starts(first):
    mixed = mixture([37, 1000, 64], [1, 2, 3])
    whole = mixed.where(first, 40)
    parts = [mixed.where(first + i, 1) for i in range(40)]
    for found, joined in zip(whole, map(np.concatenate, zip(*parts))):
        assert np.array_equal(found, joined)
    again = mixture([37, 1000, 64], [1, 2, 3]).where(first, 40)
    assert np.array_equal(whole, again)


def test_batches_hold_the_samples_in_the_order_of_their_places():
    mixed = mixture([37, 1000, 64], [1, 2, 3])
    batch = mixed.read(5, 50)
    assert np.array_equal(batch.tokens, np.stack(mixed.where(5, 50), axis=1))
    assert batch.neighbors is None


def test_fields_of_mixed_batches_are_those_of_their_readers(data):
    neighbors = NeighborReader.open(data.training, data.map, data.retrieval, 2)
    half = data.training.num_documents // 2
    parts = [(0, half), (half, data.training.num_documents)]
    readers = [SampleReader(data.training, LENGTH, neighbors, part) for part in parts]
    mixed = Mixture(readers, [1, 2], 3)
    assert (mixed.seq_length, mixed.neighbors, mixed.chunk_size) == (LENGTH, 2, 16)
    assert mixed.num_samples == sum(reader.num_samples for reader in readers)
    batch = mixed.read(4, 9)
    for i, (d, sample) in enumerate(zip(*mixed.where(4, 9))):
        one = readers[d].read([sample])
        for name, value in vars(one).items():
            found = getattr(batch, name)
            assert found.dtype == value.dtype
            assert np.array_equal(found[i : i + 1], value), name


def test_shares_are_those_of_the_sizes_by_default():
    readers, _ = mixture([300, 100]).where(0, 400)
    assert np.bincount(readers).tolist() == [300, 100]


def test_a_weight_of_zero_leaves_a_dataset_out():
    readers, _ = mixture([10, 10, 10], [1, 0, 1]).where(0, SLOTS)
    assert np.bincount(readers).tolist() == [SLOTS // 2, 0, SLOTS // 2]


@pytest.mark.parametrize(
    "weights", [[1], [1, 2, 3], [1, -1], [0, 0], [1, float("nan")], [1, float("inf")]]
)
def test_weights_that_give_no_shares_are_refused(weights):
    with pytest.raises(MixtureError, match="expected 2 of them"):
        mixture([10, 10], weights)


def test_a_weight_below_a_slot_is_refused_with_the_smallest_that_is_not():
    with pytest.raises(MixtureError, match=r"smallest possible is 0\.5, one slot of 65536"):
        mixture([10, 10], [SLOTS / 2 - 0.01, 0.01])
    mixture([10, 10], [SLOTS / 2 - 0.5, 0.5])


@pytest.mark.parametrize(
    ("name", "value"),
    [("seq_length", 8), ("neighbors", 2), ("chunk_size", 4), ("pad_id", 9), ("vocab_size", 9)],
)
def test_readers_of_different_batches_are_refused(name, value):
    readers = [Numbered(0, 10), Numbered(1, 10), Numbered(2, 10, **{name: value})]
    with pytest.raises(MixtureError, match=f"data-2 has {name} {value}, data-0 has"):
        Mixture(readers, None, 0)


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(MixtureError, match="at least one"):
        Mixture([], None, 0)
