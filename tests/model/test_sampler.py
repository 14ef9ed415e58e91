import numpy as np
import pytest

from model.sampler import permute, sample_ids


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_every_epoch_visits_every_sample_once(size):
    for epoch in range(3):
        order = permute(np.arange(size), size, seed=5, epoch=epoch)
        assert sorted(order.tolist()) == list(range(size))


def test_epochs_and_seeds_are_different_orders():
    orders = [sample_ids(0, 500, 500, 0), sample_ids(500, 500, 500, 0), sample_ids(0, 500, 500, 1)]
    assert not any(np.array_equal(a, b) for i, a in enumerate(orders) for b in orders[:i])
    assert np.mean(orders[0] == np.arange(500)) < 0.05


@pytest.mark.parametrize("cut", [1, 13, 99, 100, 101, 250])
def test_order_does_not_depend_on_where_it_is_taken_up(cut):
    whole = sample_ids(0, 300, 100, 3)
    parts = [sample_ids(0, cut, 100, 3), sample_ids(cut, 300 - cut, 100, 3)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="no training samples"):
        sample_ids(0, 1, 0, 0)
