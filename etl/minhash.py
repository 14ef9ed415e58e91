"""MinHash signatures of documents, from which near-duplicates are found. numpy only.

Words are `text.lower().encode().split()`, joined by one space; a shingle is SHINGLE_WORDS words in
a row (a text with fewer is one shingle; a word of more than 1000 bytes counts by its hash);
similarity is the Jaccard index of the sets of shingles.

One-permutation hashing (Li, Owen and Zhang 2012): each shingle's 64-bit hash chooses one of
NUM_HASHES bins by its low bits, the least of the others is the bin's value. Empty bins borrow from
others in an order that depends on the bin only (optimal densification, Shrivastava 2017), which
keeps the share of equal bins an unbiased estimate of the similarity.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 5
NUM_HASHES = 128
_LEAST_CANDIDATE_PROBABILITY = 0.99
_BLOCK_WORDS = 1 << 14
_WORD_BYTES = 1000
_FILLED_ROWS = 64
_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
_PRIME = 0x100000001B3


def signatures(texts: Sequence[str], block_words: int = _BLOCK_WORDS) -> NDArray[np.uint32]:
    """[N, NUM_HASHES] the signatures of texts.

    Memory beyond the words of the longest text: about 10 kB for each of block_words.
    """
    bins = np.full((len(texts), NUM_HASHES), _EMPTY)
    block: list[_Part] = []
    room = block_words
    for number, text in enumerate(texts):
        for part in _parts(number, text, block_words):
            block.append(part)
            room -= len(part.words)
            if room <= 0:
                _add_block(bins, block)
                block, room = [], block_words
    if block:
        _add_block(bins, block)
    return (_filled(bins) >> np.uint64(32)).astype(np.uint32)


class _Part(NamedTuple):
    """Words in a row of text number `text`; the next part of the text repeats the last four."""

    text: int
    words: list[bytes]


def _parts(number: int, text: str, block_words: int) -> Iterator[_Part]:
    words = text.lower().encode().split() or [b""]
    if len(max(words, key=len)) > _WORD_BYTES:
        words = [_shortened(word) for word in words]
    overlap = SHINGLE_WORDS - 1
    for start in range(0, max(1, len(words) - overlap), block_words):
        yield _Part(number, words[start : start + block_words + overlap])


def _shortened(word: bytes) -> bytes:
    """A very long word counts by its hash, so that a block of words has a bounded size."""
    return word if len(word) <= _WORD_BYTES else hashlib.blake2b(word).digest()


def _add_block(bins: NDArray[np.uint64], block: list[_Part]) -> None:
    hashes, counts = shingle_hashes([part.words for part in block])
    texts = np.repeat([part.text for part in block], counts)
    places = texts * NUM_HASHES + (hashes & np.uint64(NUM_HASHES - 1)).astype(np.int64)
    np.minimum.at(bins.reshape(-1), places, hashes)


def shingle_hashes(parts: list[list[bytes]]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """A hash of each shingle of each part, in order, and how many of them each part has.

    With prefix sums H of byte * p^position (mod 2^64), the bytes from s to e hash to (H[e] - H[s])
    * p^-s: a substring's hash does not depend on where it stands.
    """
    words = list(chain.from_iterable(parts))
    data = np.frombuffer(b" ".join(words), np.uint8)
    sizes = np.fromiter(map(len, words), np.int64, len(words))
    ends = np.cumsum(sizes + 1) - 1
    lengths = np.asarray([len(part) for part in parts])
    counts = np.maximum(1, lengths - SHINGLE_WORDS + 1)
    base = np.repeat(np.cumsum(lengths) - lengths, counts)
    first = base + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    last = np.minimum(first + SHINGLE_WORDS, base + np.repeat(lengths, counts)) - 1
    starts, stops = ends[first] - sizes[first], ends[last]
    powers, inverses = _powers(1 << max(18, len(data).bit_length()))
    prefix = np.zeros(len(data) + 1, np.uint64)
    np.cumsum((data + np.uint64(1)) * powers[: len(data)], out=prefix[1:])
    lengths_in_bytes = (stops - starts).astype(np.uint64)
    return _mixed((prefix[stops] - prefix[starts]) * inverses[starts] + lengths_in_bytes), counts


@lru_cache(maxsize=2)
def _powers(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """p^0.. and p^-0.., mod 2^64."""
    base = np.full(count, _PRIME, np.uint64)
    inverse = np.full(count, pow(_PRIME, -1, 1 << 64), np.uint64)
    base[0] = inverse[0] = 1
    return np.cumprod(base), np.cumprod(inverse)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _filled(bins: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The bins [N, NUM_HASHES], each empty one with the value of the first filled one in its own
    order."""
    out = bins.copy()
    order = _borrowing_order()
    lacking = np.flatnonzero((bins == _EMPTY).any(axis=1))
    for start in range(0, len(lacking), _FILLED_ROWS):
        rows = lacking[start : start + _FILLED_ROWS]
        first = (bins[rows] != _EMPTY)[:, order].argmax(axis=2)
        donors = order[np.arange(NUM_HASHES), first]
        borrowed = np.take_along_axis(bins[rows], donors, 1)
        out[rows] = np.where(bins[rows] == _EMPTY, borrowed, bins[rows])
    return out


@lru_cache(maxsize=1)
def _borrowing_order() -> NDArray[np.intp]:
    """[NUM_HASHES, NUM_HASHES] for each bin a pseudo-random order of all bins."""
    cells = np.arange(NUM_HASHES * NUM_HASHES, dtype=np.uint64).reshape(NUM_HASHES, -1)
    return _mixed(cells + np.uint64(1)).argsort(axis=1)


def rows_per_band(threshold: float) -> int:
    """The largest power of two for which texts at the threshold share a band with probability 0.99:
    1 - (1 - t^r)^(NUM_HASHES / r)."""
    rows = 1
    while rows < NUM_HASHES:
        chance = 1 - (1 - threshold ** (2 * rows)) ** (NUM_HASHES // (2 * rows))
        if chance < _LEAST_CANDIDATE_PROBABILITY:
            break
        rows *= 2
    return rows


def band_hashes(signatures: NDArray[np.uint32], threshold: float) -> NDArray[np.int64]:
    """[N, bands] a hash of each band of signatures [N, NUM_HASHES]."""
    rows = rows_per_band(threshold)
    parts = signatures.reshape(len(signatures), -1, rows).astype(np.uint64)
    out = np.zeros(parts.shape[:2], np.uint64)
    for row in range(rows):
        out = _mixed(out * np.uint64(_PRIME) + parts[:, :, row] + np.uint64(1))
    return out.view(np.int64)


def similarity(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> NDArray[np.float64]:
    """[N] the share of equal bins of signatures a, b [N, NUM_HASHES]."""
    return (a == b).mean(axis=1)
