import numpy as np
import pytest

from model.sampler import permute, sample_ids


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_every_epoch_visits_every_sample_once(size):
    for epoch in range(3):
        order = permute(np.arange(size), size, seed=5, epoch=epoch)
        assert sorted(order.tolist()) == list(range(size))


def test_epochs_and_seeds_are_different_orders():
    places = np.arange(500)
    cases = [(places, 0), (places + 500, 0), (places, 1)]
    orders = [sample_ids(at, 500, seed) for at, seed in cases]
    assert not any(np.array_equal(a, b) for i, a in enumerate(orders) for b in orders[:i])
    assert np.mean(orders[0] == np.arange(500)) < 0.05


@pytest.mark.parametrize("cut", [1, 13, 99, 100, 101, 250])
def test_order_does_not_depend_on_where_it_is_taken_up(cut):
    places = np.arange(300)
    whole = sample_ids(places, 100, 3)
    parts = [sample_ids(places[:cut], 100, 3), sample_ids(places[cut:], 100, 3)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_places_may_come_in_any_order():
    places = np.random.default_rng(0).integers(0, 1000, 200)
    assert np.array_equal(sample_ids(places, 100, 3), sample_ids(np.arange(1000), 100, 3)[places])


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="no training samples"):
        sample_ids(np.arange(1), 0, 0)
