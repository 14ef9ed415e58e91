import numpy as np
import pytest

from model.bootstrap import paired_difference


def test_mean_is_over_tokens_and_the_interval_covers_it():
    random = np.random.default_rng(0)
    tokens = random.integers(1, 500, 200).astype(float)
    off = tokens * 3
    on = off - tokens * random.normal(0.1, 0.3, 200)
    found = paired_difference(on, off, tokens)
    assert found.mean == pytest.approx((on - off).sum() / tokens.sum())
    assert found.low < found.mean < found.high
    assert found.documents == 200
    assert found == paired_difference(on, off, tokens)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """95% of 200 samples of 40 documents, within three standard deviations of that."""
    random = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        tokens = random.integers(50, 150, 40).astype(float)
        difference = tokens * random.normal(-0.2, 0.5, 40)
        found = paired_difference(difference, np.zeros(40), tokens, seed)
        hits += found.low <= -0.2 <= found.high
    assert 0.88 <= hits / 200 <= 0.995


def test_tokens_of_one_document_are_not_independent():
    """The same tokens in fewer documents give a wider interval."""
    random = np.random.default_rng(2)
    effects = random.normal(0, 1, 400)
    many = paired_difference(effects, np.zeros(400), np.ones(400))
    joined = np.repeat(effects[:20], 20).reshape(20, 20).sum(axis=1)
    few = paired_difference(joined, np.zeros(20), np.full(20, 20.0))
    assert few.high - few.low > 2 * (many.high - many.low)


def test_documents_without_tokens_do_not_count_and_one_gives_no_interval():
    loss, tokens = np.array([4.0, 0.0]), np.array([2.0, 0.0])
    found = paired_difference(loss, loss / 2, tokens)
    assert (found.mean, found.low, found.high, found.documents) == (1.0, None, None, 1)
