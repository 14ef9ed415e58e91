"""Where the gain of retrieval comes from: losses by how much of a chunk stands in neighbors.

Two overlaps of each evaluated chunk, both the longest run of common tokens (indexing/overlap.py).
`seen`: with its own ten nearest chunks, which tells how much of it the database holds (RETRO,
section 2.6). `in_sight`: with the neighbors its tokens can attend to, those of the chunk before it,
which tells how much could be copied.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etl.dataset import Dataset
from indexing.overlap import (
    default_edges,
    gain_by_bucket,
    longest_common_runs,
    overlap_curve,
)
from model.evaluation_run import ChunkSums
from model.samples import NeighborReader, documents_of

SEEN_NEIGHBORS = 10
ALPHAS = tuple(i / 8 for i in range(9))
LONG = 8
_BLOCK = 4096


@dataclass(frozen=True)
class Overlaps:
    """[num_chunks] longest runs, in tokens, of every evaluated chunk; 0 elsewhere.

    Attributes:
        neighbors: How many were looked at for `seen`: ten, or what the map holds.
    """

    seen: NDArray[np.int32]
    in_sight: NDArray[np.int32]
    neighbors: int


def measure_overlaps(
    dataset: Dataset, reader: NeighborReader, chunk_ids: NDArray[np.int64]
) -> Overlaps:
    """Overlaps of chunks [N] of a dataset; `reader` gives the neighbors in sight."""
    near = NeighborReader(reader.map, reader.retrieval, min(SEEN_NEIGHBORS, reader.map.k))
    seen = np.zeros(dataset.num_chunks, np.int32)
    in_sight = np.zeros(dataset.num_chunks, np.int32)
    for start in range(0, len(chunk_ids), _BLOCK):
        ids = chunk_ids[start : start + _BLOCK]
        seen[ids] = _runs(dataset, near, ids, ids)
        before = np.maximum(ids - 1, 0)
        goes_on = documents_of(dataset, before) == documents_of(dataset, ids)
        goes_on &= before < ids
        in_sight[ids[goes_on]] = _runs(dataset, reader, ids[goes_on], before[goes_on])
    return Overlaps(seen, in_sight, near.neighbors)


def _runs(
    dataset: Dataset,
    reader: NeighborReader,
    chunk_ids: NDArray[np.int64],
    queries: NDArray[np.int64],
) -> NDArray[np.int32]:
    """[N] longest run of chunks [N] with the neighbors of other chunks [N]."""
    chunks = dataset.get_chunk(chunk_ids, continuation=False)
    tokens, mask = reader.tokens_of(reader.map.get(queries)[:, : reader.neighbors])
    runs = longest_common_runs(chunks, tokens, chunks != dataset.manifest.pad_id, mask)
    return runs.max(axis=1, initial=0)


def describe_overlaps(
    overlaps: Overlaps, losses: dict[str, ChunkSums], chunk_size: int
) -> dict[str, Any]:
    """By kind of overlap: buckets of the gain of on over off, the share of it in chunks with
    LONG tokens or more in common, and bpb(alpha) of every condition."""
    on, off = losses["on"], losses["off"]
    tokens, edges = on.tokens.astype(np.int64), default_edges(chunk_size)
    evaluated = tokens > 0
    described: dict[str, Any] = {"neighbors_seen": overlaps.neighbors}
    for kind, runs in (("seen", overlaps.seen), ("in_sight", overlaps.in_sight)):
        columns = (runs[evaluated], off.loss[evaluated], on.loss[evaluated], tokens[evaluated])
        gain = gain_by_bucket(*columns, edges)
        total = gain.total.loss_a - gain.total.loss_b
        long = [b for b in gain.buckets if b.first >= LONG]
        described[kind] = {
            "buckets": [asdict(bucket) for bucket in gain.buckets],
            "long": {
                "least_tokens": LONG,
                "share_of_tokens": sum(b.tokens for b in long) / max(1, gain.total.tokens),
                "share_of_gain": sum(b.loss_a - b.loss_b for b in long) / total if total else None,
            },
            "bpb": _curves(runs[evaluated] / chunk_size, losses, evaluated, ALPHAS),
        }
    return described


def _curves(
    shares: NDArray[np.float64],
    losses: dict[str, ChunkSums],
    evaluated: NDArray[np.bool_],
    alphas: Sequence[float],
) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [
            asdict(point)
            for point in overlap_curve(
                shares,
                sums.loss[evaluated],
                np.rint(sums.bytes[evaluated]).astype(np.int64),
                alphas,
            )
        ]
        for name, sums in losses.items()
    }
