"""Longest common token runs of chunks and their neighbors: pairs per CPU-second against a loop.

    python benchmarks/overlap.py --pairs 100000 --compared 1000

A pair is a chunk of 64 tokens and a neighbor of 128, two neighbors a chunk; ids follow Zipf's law,
and a fifth of the neighbors hold a run of their chunk. Both sides take the same pairs in one
process, the loop the first of them; their results must be equal. Median of the rounds. The last
line is JSON.

* ours: `indexing/overlap.py`.
* loop: one pair at a time, a row of the usual table of common suffixes at a time in numpy.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from indexing.overlap import longest_common_runs

_CHUNK_SIZE, _NEIGHBORS = 64, 2
_VOCABULARY = 50_257
_COPYING = 0.2

Pairs = tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_], NDArray[np.bool_]]


def make_pairs(count: int, dtype: str) -> Pairs:
    """Chunks [N, 64] and neighbors [N, 2, 128] with their masks; a few neighbors end in pads."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, _VOCABULARY + 1)
    weights /= weights.sum()
    n, width = count // _NEIGHBORS, 2 * _CHUNK_SIZE
    chunks = rng.choice(_VOCABULARY, (n, _CHUNK_SIZE), p=weights).astype(dtype)
    others = rng.choice(_VOCABULARY, (n, _NEIGHBORS, width), p=weights).astype(dtype)
    for i, k in np.argwhere(rng.random((n, _NEIGHBORS)) < _COPYING).tolist():
        length = int(rng.integers(1, _CHUNK_SIZE + 1))
        source = int(rng.integers(0, _CHUNK_SIZE - length + 1))
        target = int(rng.integers(0, width - length + 1))
        others[i, k, target : target + length] = chunks[i, source : source + length]
    ends = rng.integers(width // 2, 4 * width, (n, _NEIGHBORS, 1))
    return chunks, others, np.ones(chunks.shape, np.bool_), np.arange(width) < ends


def loop(pairs: Pairs) -> NDArray[np.int32]:
    chunks, others, chunks_mask, others_mask = pairs
    runs = np.zeros(others.shape[:2], np.int32)
    for i, k in np.ndindex(*runs.shape):
        ending = np.zeros(others.shape[2] + 1, np.int32)
        for token in chunks[i, chunks_mask[i]]:
            is_equal = (others[i, k] == token) & others_mask[i, k]
            ending[1:] = np.where(is_equal, ending[:-1] + 1, 0)
            runs[i, k] = max(runs[i, k], ending.max())
    return runs


def pairs_per_second(work: Callable[[], NDArray[np.int32]], rounds: int) -> float:
    """Of CPU time of the whole process."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        count = work().size
        times.append(time.process_time() - start)
    return count / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--compared", type=int, default=1000, help="pairs that the loop takes")
    parser.add_argument("--dtype", default="uint16", help="of the tokens: uint16 or int32")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    pairs = make_pairs(arguments.pairs, arguments.dtype)
    count = arguments.compared // _NEIGHBORS
    few = (pairs[0][:count], pairs[1][:count], pairs[2][:count], pairs[3][:count])
    runs = longest_common_runs(*pairs)
    if not np.array_equal(loop(few), runs[:count]):
        raise SystemExit("the loop found other runs")
    ours = pairs_per_second(lambda: longest_common_runs(*pairs), arguments.rounds)
    looped = pairs_per_second(lambda: loop(few), arguments.rounds)
    print(f"ours   {ours:>10,.0f} pairs/CPU-s, {1e6 / ours:.2f} CPU-s a million pairs")
    print(f"loop   {looped:>10,.0f} pairs/CPU-s, {1e6 / looped:.2f} CPU-s a million pairs")
    print(
        json.dumps(
            {
                "ours_pairs_per_cpu_s": ours,
                "loop_pairs_per_cpu_s": looped,
                "ratio": ours / looped,
                "cpu_s_per_million_pairs": 1e6 / ours,
                "mean_run": float(runs.mean()),
                **vars(arguments),
            }
        )
    )


if __name__ == "__main__":
    main()
