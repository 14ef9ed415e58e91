"""Overlap of chunks with their neighbors: how much of what retrieval gains is copied text.

Measured on evaluation chunks and the tokens that the decoder sees of their neighbors, as in RETRO
(arXiv 2112.04426), section 2.6: of a chunk of m tokens, s in [0, m] is the length of the longest
run of tokens that it shares with one of its neighbors (chunk and continuation), and r = s / m.
numpy only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_BLOCK_PAIRS = 1 << 10


class OverlapError(ValueError):
    """Arrays or edges that do not fit together."""


def longest_common_runs(
    chunks: NDArray[Any],
    others: NDArray[Any],
    chunks_mask: NDArray[np.bool_],
    others_mask: NDArray[np.bool_],
) -> NDArray[np.int32]:
    """[N, K] length of the longest run of tokens that stands in a chunk and in one neighbor.

    Takes a thousand pairs at a time: about 1 MB for chunks of 64, whatever N is.

    Args:
        chunks: Token ids [N, M] of any integer dtype.
        others: Token ids [N, K, R] of the neighbors of each chunk.
        chunks_mask: [N, M], False where a token equals none and breaks a run: pads.
        others_mask: [N, K, R] the same of the neighbors: pads, and all of a missing neighbor.

    Raises:
        OverlapError: shapes that do not fit, or tokens that are no integers.
    """
    _check_pairs(chunks, others, chunks_mask, others_mask)
    count, k = others.shape[:2]
    runs = np.zeros((count, k), np.int32)
    if not others.size or not chunks.size:
        return runs
    highest = max(int(chunks.max()), int(others.max()))
    lowest = min(int(chunks.min()), int(others.min()))
    # Two ids above all tokens, which equal nothing, stand for the masked ones of either side.
    dtype = np.result_type(np.min_scalar_type(lowest), np.min_scalar_type(highest + 2))
    step = max(1, _BLOCK_PAIRS // k)
    for start in range(0, count, step):
        part = slice(start, start + step)
        left = np.where(chunks_mask[part], chunks[part].astype(dtype), dtype.type(highest + 1))
        right = np.where(others_mask[part], others[part].astype(dtype), dtype.type(highest + 2))
        runs[part] = _block_runs(
            np.ascontiguousarray(left.T), np.ascontiguousarray(right.transpose(2, 1, 0))
        ).T
    return runs


def _check_pairs(
    chunks: NDArray[Any],
    others: NDArray[Any],
    chunks_mask: NDArray[np.bool_],
    others_mask: NDArray[np.bool_],
) -> None:
    shapes = (chunks.shape, others.shape, chunks_mask.shape, others_mask.shape)
    if (
        (chunks.ndim, others.ndim) != (2, 3)
        or len(chunks) != len(others)
        or shapes[:2] != shapes[2:]
    ):
        raise OverlapError(
            f"chunks, others and their masks are {', '.join(str(list(s)) for s in shapes)}; "
            "expected [N, M], [N, K, R], [N, M] and [N, K, R]"
        )
    kinds = [array.dtype for array in (chunks, others, chunks_mask, others_mask)]
    if any(dtype.kind not in "iu" for dtype in kinds[:2]) or kinds[2:] != [np.bool_, np.bool_]:
        raise OverlapError(
            f"chunks, others and their masks are {', '.join(map(str, kinds))}; expected integers "
            "and booleans"
        )


def _block_runs(chunks_MB: NDArray[Any], others_RKB: NDArray[Any]) -> NDArray[Any]:
    """[K, B] the longest runs, of tokens of one dtype.

    Of each diagonal (place in the neighbor less place in the chunk) only the run that ends at the
    last token is kept, so that a step of one chunk token updates a slice of the diagonals in place,
    with the pairs in the contiguous axis.
    """
    m, r = len(chunks_MB), len(others_RKB)
    lengths = np.min_scalar_type(min(m, r))
    ending = np.zeros((m + r - 1, *others_RKB.shape[1:]), lengths)
    longest = np.zeros(others_RKB.shape, lengths)
    is_equal = np.empty(others_RKB.shape, np.bool_)
    for i in range(m):
        np.equal(chunks_MB[i], others_RKB, out=is_equal)
        run = ending[m - 1 - i : m - 1 - i + r]
        np.add(run, 1, out=run)
        np.multiply(run, is_equal, out=run)
        np.maximum(longest, run, out=longest)
    return longest.max(axis=0)


def overlap_shares(runs: NDArray[np.int32], chunk_size: int) -> NDArray[np.float64]:
    """[N] r = s / m of chunks with runs [N, K]: 0 without neighbors, 1 for a chunk that one of them
    holds as a whole."""
    return runs.max(axis=1, initial=0) / chunk_size


@dataclass(frozen=True)
class CurvePoint:
    """Bits a byte of the chunks with an overlap share of at most alpha; None without bytes."""

    alpha: float
    chunks: int
    num_bytes: int
    bpb: float | None


def overlap_curve(
    r: NDArray[np.floating[Any]],
    loss_nats: NDArray[np.floating[Any]],
    num_bytes: NDArray[np.integer[Any]],
    alphas: Sequence[float],
) -> list[CurvePoint]:
    """Bits a byte by overlap, after figure 6 of RETRO: a point for each alpha.

    Args:
        r: Overlap shares [N] of the chunks.
        loss_nats: Sum of the losses [N] of each chunk's tokens, in nats.
        num_bytes: Bytes of text [N] that these tokens stand for.
        alphas: Bounds in [0, 1]; at 1 the point holds every chunk.

    Raises:
        OverlapError: arrays of different shapes.
    """
    _check_columns({"r": r, "loss_nats": loss_nats, "num_bytes": num_bytes})
    points = []
    for alpha in map(float, alphas):
        held = r <= alpha
        count = int(num_bytes[held].sum())
        loss = float(loss_nats[held].sum(dtype=np.float64))
        points.append(
            CurvePoint(alpha, int(held.sum()), count, loss / log(2) / count if count else None)
        )
    return points


@dataclass(frozen=True)
class Bucket:
    """Chunks whose longest run has first .. last tokens, under model a and model b.

    Attributes:
        loss_a: Sum over the tokens, in nats; loss_b likewise.
        mean_loss_a: Nats a token; None without tokens; mean_loss_b likewise.
        share_of_tokens: Of the tokens of all chunks; None if these are 0.
        share_of_gain: loss_a - loss_b here, of that of all chunks; None if that is 0. It is
            negative, or above 1, where buckets gain and others lose.
    """

    first: int
    last: int
    chunks: int
    tokens: int
    loss_a: float
    loss_b: float
    mean_loss_a: float | None
    mean_loss_b: float | None
    share_of_tokens: float | None
    share_of_gain: float | None


@dataclass(frozen=True)
class OverlapGain:
    """`total` holds the sums of the buckets."""

    buckets: tuple[Bucket, ...]
    total: Bucket


def default_edges(chunk_size: int) -> tuple[int, ...]:
    """0, 1, 4, 8, 16, ... and chunk_size + 1: buckets of 0, 1-3, 4-7, ... up to chunk_size."""
    powers = (1 << i for i in range(2, (chunk_size - 1).bit_length()))
    return (0, 1, *powers, chunk_size + 1)


def gain_by_bucket(
    run_lengths: ArrayLike,
    loss_a: NDArray[np.floating[Any]],
    loss_b: NDArray[np.floating[Any]],
    tokens: NDArray[np.integer[Any]],
    edges: Sequence[int],
) -> OverlapGain:
    """Where model b gains over model a: the losses of chunks by the length of their overlap.

    Args:
        run_lengths: Longest run s [N] of each chunk, integers.
        loss_a: Sum of the losses [N] of each chunk's tokens in nats, without retrieval for example.
        loss_b: The same of the other model.
        tokens: How many tokens [N] these sums are over.
        edges: Ascending; bucket i holds lengths edges[i] .. edges[i + 1] - 1 (`default_edges`).

    Raises:
        OverlapError: arrays of different shapes, edges that do not ascend, or a length outside.
    """
    lengths = np.asarray(run_lengths)
    columns = {"tokens": tokens, "loss_a": loss_a, "loss_b": loss_b}
    _check_columns({"run_lengths": lengths, **columns})
    if len(edges) < 2 or (np.diff(edges) <= 0).any():
        raise OverlapError(f"edges are {list(edges)}; expected two or more that ascend")
    if lengths.size and (lengths.min() < edges[0] or lengths.max() >= edges[-1]):
        raise OverlapError(
            f"runs of {lengths.min()}..{lengths.max()} tokens; the edges hold "
            f"{edges[0]}..{edges[-1] - 1}: give edges up to chunk_size + 1"
        )
    places = np.searchsorted(np.asarray(edges), lengths, side="right") - 1
    sums = [
        (
            int((places == i).sum()),
            int(tokens[places == i].sum()),
            float(loss_a[places == i].sum(dtype=np.float64)),
            float(loss_b[places == i].sum(dtype=np.float64)),
        )
        for i in range(len(edges) - 1)
    ]
    total = (
        sum(row[0] for row in sums),
        sum(row[1] for row in sums),
        sum(row[2] for row in sums),
        sum(row[3] for row in sums),
    )
    buckets = [
        _bucket(first, stop - 1, row, total)
        for first, stop, row in zip(edges[:-1], edges[1:], sums, strict=True)
    ]
    return OverlapGain(tuple(buckets), _bucket(edges[0], edges[-1] - 1, total, total))


_Sums = tuple[int, int, float, float]


def _bucket(first: int, last: int, sums: _Sums, total: _Sums) -> Bucket:
    chunks, tokens, loss_a, loss_b = sums
    gain = total[2] - total[3]
    return Bucket(
        first=first,
        last=last,
        chunks=chunks,
        tokens=tokens,
        loss_a=loss_a,
        loss_b=loss_b,
        mean_loss_a=loss_a / tokens if tokens else None,
        mean_loss_b=loss_b / tokens if tokens else None,
        share_of_tokens=tokens / total[1] if total[1] else None,
        share_of_gain=(loss_a - loss_b) / gain if gain else None,
    )


def _check_columns(columns: dict[str, NDArray[Any]]) -> None:
    shapes = {name: list(column.shape) for name, column in columns.items()}
    first = next(iter(columns.values()))
    if first.ndim != 1 or any(column.shape != first.shape for column in columns.values()):
        raise OverlapError(f"shapes are {shapes}; expected one value a chunk in each, [N]")
