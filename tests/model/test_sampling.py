import math
from collections import Counter

import pytest
import torch

from model.sampling import choose_token, keep_top_k, keep_top_p, penalize_repetition

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.9, -0.2])


def kept(logits):
    return {i for i, logit in enumerate(logits.tolist()) if logit > -math.inf}


def test_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones():
    found = penalize_repetition(LOGITS, torch.tensor([1, 2]), 2.0)
    assert found.tolist() == pytest.approx([0.3, 1.0, -2.0, 1.5, 0.9, -0.2])
    assert penalize_repetition(LOGITS, torch.tensor([1, 2]), 0.5)[1] == 4.0


@pytest.mark.parametrize("k", [1, 2, 4, 6, 9])
def test_top_k_keeps_exactly_the_k_largest(k):
    expected = set(sorted(range(6), key=lambda i: -LOGITS[i])[:k])
    found = keep_top_k(LOGITS, k)
    assert kept(found) == expected
    assert all(found[i] == LOGITS[i] for i in expected)
    assert len(kept(keep_top_k(torch.zeros(6), k))) == min(k, 6)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.43, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_sum_up_to_p(p):
    probabilities, expected, total = LOGITS.softmax(0), set(), 0.0
    for i in sorted(range(6), key=lambda i: -LOGITS[i]):
        if total < p:
            expected.add(i)
        total += float(probabilities[i])
    found = keep_top_p(LOGITS, p)
    assert kept(found) == expected
    assert all(found[i] == LOGITS[i] for i in expected)


def test_temperature_0_takes_the_most_likely():
    assert choose_token(LOGITS, 0.0, 0, 1.0, torch.Generator()) == 1


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.5, 0, 0.7), (1.0, 4, 0.8)],
)
def test_draws_have_the_frequencies_of_the_definition(temperature, top_k, top_p):
    """Chi-squared against the distribution written out; at most 5 degrees of freedom."""
    weights = {i: math.exp(float(logit) / temperature) for i, logit in enumerate(LOGITS)}
    ordered = sorted(weights, key=lambda i: -weights[i])[: top_k or None]
    total, chosen, mass = sum(weights[i] for i in ordered), [], 0.0
    for i in ordered:
        if mass < top_p:
            chosen.append(i)
        mass += weights[i] / total
    left, random, draws = sum(weights[i] for i in chosen), torch.Generator().manual_seed(0), 4000
    counts = Counter(choose_token(LOGITS, temperature, top_k, top_p, random) for _ in range(draws))
    assert set(counts) == set(chosen)
    expected = {i: draws * weights[i] / left for i in chosen}
    assert sum((counts[i] - expected[i]) ** 2 / expected[i] for i in chosen) < 20.5


def test_tokens_that_are_excluded_are_never_drawn():
    logits = LOGITS.index_fill(0, torch.tensor([1, 3]), -math.inf)
    random = torch.Generator().manual_seed(0)
    assert {choose_token(logits, 1.0, 5, 0.99, random) for _ in range(300)} <= {0, 2, 4, 5}
