import json
from dataclasses import asdict
from math import log
from typing import Any

import numpy as np
import pytest

from indexing.overlap import (
    OverlapError,
    default_edges,
    gain_by_bucket,
    longest_common_runs,
    overlap_curve,
    overlap_shares,
)


def brute_force(chunk, other, chunk_mask, other_mask):
    """The longest run by trying every pair of places."""
    best = 0
    for i in range(len(chunk)):
        for j in range(len(other)):
            n = 0
            while (
                i + n < len(chunk)
                and j + n < len(other)
                and chunk_mask[i + n]
                and other_mask[j + n]
                and chunk[i + n] == other[j + n]
            ):
                n += 1
            best = max(best, n)
    return best


def all_kept(*arrays):
    return [np.ones(array.shape, np.bool_) for array in arrays]


def run_of(chunk, others):
    chunks, others = np.asarray([chunk]), np.asarray([others])
    return longest_common_runs(chunks, others, *all_kept(chunks, others))[0].tolist()


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "u4", "i8", "u8"])
@pytest.mark.parametrize(
    "shape", [(40, 9, 3, 14), (40, 12, 1, 5), (5, 1, 2, 1)], ids=["long", "short", "single"]
)
def test_runs_are_those_of_brute_force(dtype, shape):
    (n, m, k, r), rng = shape, np.random.default_rng(3)
    top = np.iinfo(dtype).max if np.dtype(dtype).itemsize < 8 else 2**40
    # Both ends of the dtype: masked tokens must equal none of them.
    alphabet = np.asarray([0, top - 1, top], dtype)
    chunks, others = rng.choice(alphabet, (n, m)), rng.choice(alphabet, (n, k, r))
    masks = rng.random((n, m)) < 0.8, rng.random((n, k, r)) < 0.8
    masks[1][0, 0] = False
    expected = [
        [brute_force(chunks[i], others[i, j], masks[0][i], masks[1][i, j]) for j in range(k)]
        for i in range(n)
    ]
    runs = longest_common_runs(chunks, others, *masks)
    assert runs.tolist() == expected
    assert runs.dtype == np.int32
    assert runs[0, 0] == 0


def test_negative_ids_and_other_dtypes_of_either_side_compare_by_value():
    chunks = np.asarray([[-156, 7, 90]], np.int32)
    others = np.asarray([[[100, 7, 90], [7, 100, 100]]], np.uint32)
    assert longest_common_runs(chunks, others, *all_kept(chunks, others)).tolist() == [[2, 1]]


def test_planted_runs_have_their_length_wherever_they_stand():
    """More pairs than a block holds; runs over the border of a neighbor's chunk and continuation,
    and at all ends, in chunks longer than a byte counts."""
    n, m, rng = 1500, 300, np.random.default_rng(0)
    chunks = rng.integers(0, 30_000, (n, m)).astype(np.uint16)
    others = rng.integers(30_000, 65_536, (n, 1, 2 * m)).astype(np.uint16)
    lengths = rng.integers(0, m + 1, n)
    lengths[:2] = m
    sources = rng.integers(0, m - lengths + 1)
    targets = rng.integers(0, 2 * m - lengths + 1)
    targets[:2] = m - 150, m
    targets[2::3] = np.minimum(m - lengths[2::3] // 2, 2 * m - lengths[2::3])
    for i in range(n):
        run = chunks[i, sources[i] : sources[i] + lengths[i]]
        others[i, 0, targets[i] : targets[i] + lengths[i]] = run
    runs = longest_common_runs(chunks, others, *all_kept(chunks, others))
    assert runs[:, 0].tolist() == lengths.tolist()
    assert overlap_shares(runs, m).tolist() == (lengths / m).tolist()


def test_a_run_ends_with_its_neighbor():
    chunk = [1, 2, 3, 4, 5, 6]
    assert run_of(chunk, [[9, 9, 1, 2, 3, 4], [5, 6, 9, 9, 9, 9]]) == [4, 2]
    assert run_of(chunk, [[4, 5, 6, 1, 2, 9], [9, 9, 9, 9, 9, 3]]) == [3, 1]


def test_masked_tokens_break_runs_of_either_side():
    chunks, others = np.asarray([[1, 2, 3, 4, 5, 6]]), np.asarray([[[1, 2, 3, 4, 5, 6]]])
    keep = all_kept(chunks, others)
    assert longest_common_runs(chunks, others, *keep).tolist() == [[6]]
    for mask in keep:
        mask[..., 2] = False
        assert longest_common_runs(chunks, others, *keep).tolist() == [[3]]
        mask[..., 2] = True
    keep[0][..., 1], keep[1][..., 4] = False, False
    assert longest_common_runs(chunks, others, *keep).tolist() == [[2]]


def test_no_chunks_and_no_neighbors_have_no_runs():
    for n, k in ((0, 2), (3, 0)):
        chunks, others = np.zeros((n, 4), np.uint16), np.zeros((n, k, 8), np.uint16)
        runs = longest_common_runs(chunks, others, *all_kept(chunks, others))
        assert runs.shape == (n, k)
        assert overlap_shares(runs, 4).tolist() == [0] * n


def test_runs_refuse_what_does_not_fit():
    chunks, others = np.zeros((2, 4), np.uint16), np.zeros((2, 1, 8), np.uint16)
    keep = all_kept(chunks, others)
    with pytest.raises(OverlapError, match=r"\[N, K, R\]"):
        longest_common_runs(chunks, others[:1], keep[0], keep[1][:1])
    with pytest.raises(OverlapError, match=r"\[2, 3\]"):
        longest_common_runs(chunks, others, keep[0][:, :3], keep[1])
    with pytest.raises(OverlapError, match="float64"):
        longest_common_runs(chunks.astype(float), others, *keep)
    numbers: Any = keep[0].astype(np.uint8)
    with pytest.raises(OverlapError, match="expected integers and booleans"):
        longest_common_runs(chunks, others, numbers, keep[1])


@pytest.fixture
def scored():
    """Runs, losses of two models, bytes and tokens of 500 chunks of 64; sums are exact in
    float64."""
    rng = np.random.default_rng(1)
    runs = rng.integers(0, 65, 500)
    losses = rng.integers(1, 1 << 16, (2, 500)) / 1024
    return runs, *losses, rng.integers(0, 300, 500), rng.integers(0, 65, 500)


def test_the_curve_ends_at_the_bits_a_byte_of_all_chunks(scored):
    runs, loss, _, num_bytes, _ = scored
    alphas = [0, 0.125, 0.5, 1]
    points = overlap_curve(runs / 64, loss, num_bytes, alphas)
    assert points[-1].bpb == loss.sum() / log(2) / num_bytes.sum()
    assert points[-1].chunks == 500
    for point in points:
        held = [i for i in range(500) if runs[i] <= point.alpha * 64]
        assert (point.chunks, point.num_bytes) == (len(held), num_bytes[held].sum())
        assert point.bpb == loss[held].sum() / log(2) / num_bytes[held].sum()
    assert json.loads(json.dumps([asdict(point) for point in points]))[1]["alpha"] == 0.125


def test_the_curve_has_no_value_where_there_are_no_bytes():
    points = overlap_curve(np.asarray([0.5, 1]), np.ones(2), np.asarray([0, 4]), [0, 0.5, 1])
    assert [(point.chunks, point.bpb) for point in points] == [
        (0, None),
        (1, None),
        (2, 2 / log(2) / 4),
    ]


def test_a_bound_includes_shares_equal_to_it_in_either_precision():
    for dtype in (np.float32, np.float64):
        shares = (np.arange(11) / 10).astype(dtype)
        ones = np.ones(11, np.int64)
        points = overlap_curve(shares, ones.astype(dtype), ones, [i / 10 for i in range(11)])
        assert [point.chunks for point in points] == list(range(1, 12))


def test_buckets_hold_every_chunk_once_and_add_up(scored):
    runs, loss_a, loss_b, _, tokens = scored
    gain = gain_by_bucket(runs, loss_a, loss_b, tokens, default_edges(64))
    bounds = [(bucket.first, bucket.last) for bucket in gain.buckets]
    assert bounds == [(0, 0), (1, 3), (4, 7), (8, 15), (16, 31), (32, 64)]
    for bucket in gain.buckets:
        held = (runs >= bucket.first) & (runs <= bucket.last)
        assert (bucket.chunks, bucket.tokens) == (held.sum(), tokens[held].sum())
        assert (bucket.loss_a, bucket.loss_b) == (loss_a[held].sum(), loss_b[held].sum())
        assert bucket.mean_loss_b == loss_b[held].sum() / tokens[held].sum()
    total = gain.total
    assert (total.chunks, total.tokens) == (500, tokens.sum())
    assert (total.loss_a, total.loss_b) == (loss_a.sum(), loss_b.sum())
    assert (total.share_of_tokens, total.share_of_gain) == (1, 1)
    for share in ("share_of_tokens", "share_of_gain"):
        assert sum(getattr(bucket, share) for bucket in gain.buckets) == pytest.approx(1, rel=1e-12)
    assert json.loads(json.dumps(asdict(gain)))["total"]["chunks"] == 500


def test_the_gain_is_where_the_losses_differ():
    ones = np.ones(4)
    gain = gain_by_bucket(
        [0, 2, 2, 16], ones, np.asarray([1, 0.5, 0.25, 1.25]), ones.astype(int), (0, 1, 8, 17)
    )
    assert [bucket.share_of_gain for bucket in gain.buckets] == [0, 1.25, -0.25]
    assert [bucket.mean_loss_b for bucket in gain.buckets] == [1, 0.375, 1.25]
    same = gain_by_bucket([2, 2], ones[:2], ones[:2], np.ones(2, int), (0, 1, 3))
    assert [bucket.share_of_gain for bucket in same.buckets] == [None, None]
    assert same.buckets[0].mean_loss_a is None


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 5, 8, 16, 64, 100])
def test_default_edges_hold_every_length_of_a_chunk(chunk_size):
    edges = default_edges(chunk_size)
    assert list(edges) == sorted(set(edges))
    assert (edges[0], edges[-1]) == (0, chunk_size + 1)


def test_buckets_refuse_what_does_not_fit():
    ones, tokens = np.ones(2), np.ones(2, int)
    with pytest.raises(OverlapError, match=r"edges hold 0\.\.3"):
        gain_by_bucket([0, 4], ones, ones, tokens, (0, 4))
    with pytest.raises(OverlapError, match="ascend"):
        gain_by_bucket([0, 1], ones, ones, tokens, (0, 2, 2))
    with pytest.raises(OverlapError, match="one value a chunk"):
        gain_by_bucket([0, 1], ones, ones[:1], tokens, (0, 2))
    with pytest.raises(OverlapError, match="one value a chunk"):
        overlap_curve(ones, ones, tokens[:1], [1])
