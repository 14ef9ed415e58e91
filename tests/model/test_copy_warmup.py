import numpy as np
import pytest

from model.copy_warmup import random_copies

WORDS = np.arange(5, 4_000_000, dtype=np.int32)
SIZE, LENGTH, NEIGHBORS = 16, 80, 3


def batch_of(places, seed=0, neighbors=NEIGHBORS):
    return random_copies(np.asarray(places), seed, WORDS, LENGTH, SIZE, neighbors)


def test_tokens_depend_on_seed_and_place_alone():
    whole = batch_of([7, 8, 9])
    for i, place in enumerate([7, 8, 9]):
        alone = batch_of([place])
        for name in ("tokens", "labels", "neighbors", "loss_mask"):
            assert (getattr(alone, name)[0] == getattr(whole, name)[i]).all()
    assert (batch_of([7], seed=1).tokens != whole.tokens[:1]).mean() > 0.9


@pytest.mark.parametrize("neighbors", [1, NEIGHBORS])
def test_the_first_neighbor_is_the_sample_itself_near_its_chunk(neighbors):
    batch = batch_of(range(20), neighbors=neighbors)
    assert batch.neighbors.shape == (20, LENGTH // SIZE, neighbors, 2 * SIZE)
    assert batch.neighbors_mask.all()
    assert np.isin(batch.neighbors, WORDS).all()
    assert (batch.tokens[:, 1:] == batch.labels[:, :-1]).all()
    starts = set()
    for b, u in np.ndindex(20, LENGTH // SIZE):
        text = np.append(batch.tokens[b], batch.labels[b, -1])
        first = batch.neighbors[b, u, 0]
        places = [int(np.flatnonzero(text == token)[0]) if token in text else -1 for token in first]
        inside = [(place, i) for i, place in enumerate(places) if place >= 0]
        (start,) = {place - i for place, i in inside}
        starts.add(start - u * SIZE)
        assert np.isin(batch.neighbors[b, u, 1:], text).sum() <= 1
    assert starts == set(range(-SIZE // 2, SIZE // 2 + 1))


def test_labels_that_the_neighbor_in_sight_holds_count():
    batch = batch_of(range(5))
    for b, i in np.ndindex(batch.labels.shape):
        chunk = (i + 1) // SIZE - 1
        held = chunk >= 0 and batch.labels[b, i] in batch.neighbors[b, chunk, 0]
        assert batch.loss_mask[b, i] == held
    assert 0.5 < batch.loss_mask.mean() < 0.9
