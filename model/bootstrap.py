"""How sure a difference of two losses is: a paired bootstrap over documents. numpy only.

Documents, not tokens, are drawn: tokens of one document are alike, and counting them as independent
would make intervals far too narrow.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Difference:
    """Mean loss of a minus that of b in nats a token, with its 95% interval; negative: a is better.
    low and high are None where fewer than two documents count."""

    mean: float
    low: float | None
    high: float | None
    documents: int


def paired_difference(
    loss_a: NDArray[np.float64],
    loss_b: NDArray[np.float64],
    tokens: NDArray[np.float64],
    seed: int = 0,
) -> Difference:
    """Of sums of nats of the same tokens of each document [D], and how many they are [D].

    A resample draws D documents with replacement and divides its sums; the interval is from the
    2.5% to the 97.5% quantile of 2000 of them.
    """
    counts = tokens > 0
    difference, tokens = (loss_a - loss_b)[counts], tokens[counts]
    documents = len(tokens)
    mean = float(difference.sum() / max(1.0, tokens.sum()))
    if documents < 2:
        return Difference(mean, None, None, documents)
    random = np.random.default_rng(seed)
    means = []
    rows = max(1, _BLOCK // documents)
    for start in range(0, RESAMPLES, rows):
        size = (min(rows, RESAMPLES - start), documents)
        drawn = random.integers(0, documents, size)
        means.append(difference[drawn].sum(axis=1) / tokens[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Difference(mean, float(low), float(high), documents)
