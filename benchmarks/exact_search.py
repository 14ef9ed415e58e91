"""Exact torch search: time, and its share of the matrix product rate of the same device.

    python benchmarks/exact_search.py --device cuda --vectors 10000000 --dimension 768
    python benchmarks/exact_search.py --device cpu --vectors 200000 --queries 2048

Vectors are random ones of unit length in fp16. Seconds are wall seconds of whole searches, copies
of queries and results included, median of the rounds; the product rate is that of a block of
queries with a block of vectors in the searcher's dtype, alone. For some queries the result is
compared with faiss's float32 search. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from indexing.embeddings import Embeddings
from indexing.exact_torch import TorchSearcher

_CHUNK = 1 << 18
_QUERIES = 4096
_BLOCK_FLOATS = (256 << 20) // 4


@dataclass
class Made:
    """Unit vectors in memory, read as embeddings are."""

    vectors: NDArray[np.float16]

    @property
    def dimension(self) -> int:
        return self.vectors.shape[1]

    def slices(self, start: int, stop: int) -> Iterator[tuple[int, NDArray[np.float16]]]:
        yield start, self.vectors[start:stop]


def unit_vectors(count: int, dimension: int, device: str) -> NDArray[np.float16]:
    generator = torch.Generator(device).manual_seed(0)
    out = np.empty((count, dimension), np.float16)
    for start in range(0, count, _CHUNK):
        rows = min(_CHUNK, count - start)
        part = torch.randn(rows, dimension, generator=generator, device=device)
        part /= part.norm(dim=1, keepdim=True)
        out[start : start + rows] = part.half().cpu().numpy()
    return out


def median_seconds(work: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def product_rate(dimension: int, device: str, dtype: torch.dtype) -> float:
    """Floating point operations a second of a block's product."""
    columns = _BLOCK_FLOATS // dimension // 64 * 64
    left = torch.randn(_QUERIES, dimension, device=device, dtype=dtype)
    right = torch.randn(columns, dimension, device=device, dtype=dtype)
    seconds = median_seconds(lambda: left @ right.T, 5)
    return 2 * _QUERIES * columns * dimension / seconds


def same_as_faiss(
    vectors: NDArray[np.float16], queries: NDArray[np.float32], found: NDArray[np.int64]
) -> float:
    """Share of neighbors found that faiss finds too."""
    import faiss

    k = found.shape[1]
    heap = faiss.ResultHeap(len(queries), k, keep_max=True)
    for start in range(0, len(vectors), _CHUNK):
        block = vectors[start : start + _CHUNK].astype(np.float32)
        scores, ids = faiss.knn(queries, block, k, faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores, ids + start)
    heap.finalize()
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(found, heap.I, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vectors", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=16_384)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compared", type=int, default=64, help="queries compared with faiss")
    arguments = parser.parse_args()
    vectors = unit_vectors(arguments.vectors, arguments.dimension, arguments.device)
    noise = np.random.default_rng(1).standard_normal((arguments.queries, arguments.dimension))
    queries = vectors[: arguments.queries].astype(np.float32) + 0.02 * noise.astype(np.float32)
    searcher = TorchSearcher(cast(Embeddings, Made(vectors)), arguments.vectors, arguments.device)
    seconds = median_seconds(lambda: searcher.search(queries, arguments.k), arguments.rounds)
    flops = 2 * arguments.vectors * arguments.queries * arguments.dimension / seconds
    dtype = torch.float32 if arguments.device == "cpu" else torch.float16
    peak = product_rate(arguments.dimension, arguments.device, dtype)
    compared = queries[: arguments.compared]
    found = searcher.search(compared, arguments.k)[1]
    print(
        json.dumps(
            {
                "seconds": seconds,
                "queries_per_s": arguments.queries / seconds,
                "tflops": flops / 1e12,
                "product_tflops": peak / 1e12,
                "share": flops / peak,
                "same_as_faiss": same_as_faiss(vectors, compared, found),
                **{name: getattr(arguments, name) for name in ("vectors", "queries", "k")},
                "dimension": arguments.dimension,
                "device": arguments.device,
            }
        )
    )


if __name__ == "__main__":
    main()
