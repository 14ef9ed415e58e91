import random

import numpy as np
import pytest

from etl.minhash import (
    NUM_HASHES,
    SHINGLE_WORDS,
    band_hashes,
    rows_per_band,
    shingle_hashes,
    signatures,
    similarity,
)

TEXTS = [
    "one",
    "Two  words",
    "exactly five words are here",
    "six words make two shingles surely",
    "naïve Café — ÜBER \U0001f600 日本語 text with\ttabs\nand lines \x00 in it",
    "w" * 5000 + " is a very long word " + "w" * 5000,
]


def shingles(text):
    words = [word if len(word) <= 1000 else b"long" for word in text.lower().encode().split()]
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    return [tuple(words[i : i + SHINGLE_WORDS]) for i in range(count)]


def random_text(generator, words):
    return " ".join(f"w{generator.randrange(5000)}" for _ in range(words))


def edited(generator, text, share):
    words = text.split()
    for i in generator.sample(range(len(words)), int(share * len(words))):
        words[i] = f"x{generator.randrange(10**9)}"
    return " ".join(words)


def jaccard(a, b):
    a, b = set(shingles(a)), set(shingles(b))
    return len(a & b) / len(a | b)


def test_equal_shingles_have_equal_hashes_wherever_they_stand_and_others_do_not():
    generator = random.Random(1)
    texts = [
        *TEXTS,
        random_text(generator, 3000),
        *(random_text(generator, n) for n in range(1, 9)),
    ]
    texts += [f"{texts[6]} tail", f"{texts[4]} {texts[4]}"]
    parts = [text.lower().encode().split() for text in texts]
    hashes, counts = shingle_hashes(parts)
    assert counts.tolist() == [max(1, len(words) - SHINGLE_WORDS + 1) for words in parts]
    known = {}
    plain = [tuple(w[i : i + SHINGLE_WORDS]) for w, c in zip(parts, counts) for i in range(c)]
    for shingle, value in zip(plain, hashes.tolist(), strict=True):
        assert known.setdefault(shingle, value) == value
    assert len(set(known.values())) == len(known)


@pytest.mark.parametrize("block_words", [1, 2, 4, 5, 7, 100])
def test_blocks_and_batches_do_not_matter(block_words):
    generator = random.Random(2)
    texts = [*TEXTS, *(random_text(generator, n) for n in (4, 5, 6, 11, 300))]
    alone = np.concatenate([signatures([text]) for text in texts])
    assert np.array_equal(signatures(texts, block_words), alone)
    assert np.array_equal(signatures(texts), alone)


def test_case_and_white_space_do_not_matter_but_words_do():
    a, b, c = signatures(["A b  C d\ne f", "a B c d e F", "a b c d e g"])
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("words", [8, 40, 400, 4000])
def test_the_estimate_is_unbiased(words):
    """Mean error within 0.02 over 200 pairs; a single estimate of 128 bins has a deviation of up to
    0.044."""
    generator = random.Random(words)
    pairs = []
    for _ in range(200):
        text = random_text(generator, words)
        pairs.append((text, edited(generator, text, generator.uniform(0, 0.15))))
    exact = np.asarray([jaccard(a, b) for a, b in pairs])
    estimate = similarity(signatures([a for a, _ in pairs]), signatures([b for _, b in pairs]))
    assert exact.std() > 0.1
    assert abs((estimate - exact).mean()) < 0.02
    assert abs(estimate - exact).mean() < 0.05


def test_bands_catch_texts_at_the_threshold():
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
        rows = rows_per_band(threshold)
        assert 1 - (1 - threshold**rows) ** (NUM_HASHES // rows) >= 0.99
        wider = 1 - (1 - threshold ** (2 * rows)) ** (NUM_HASHES // (2 * rows))
        assert wider < 0.99


def test_a_band_is_equal_exactly_if_its_bins_are():
    generator = np.random.default_rng(0)
    first = generator.integers(0, 2**32, (1, NUM_HASHES), dtype=np.uint32)
    second = first.copy()
    second[0, 5] += 1
    rows = rows_per_band(0.8)
    a, b = band_hashes(first, 0.8), band_hashes(second, 0.8)
    assert np.flatnonzero(a != b).tolist() == [5 // rows]
