"""Embeddings of made-up vectors with clusters, as the embed stage would store them."""

from dataclasses import asdict

import numpy as np

from etl.storage import StageFolder
from indexing.embeddings import Embeddings

DIMENSION = 32


def made_up_vectors(count, seed=0, dimension=DIMENSION):
    """[count, dimension] fp16 unit vectors around 40 centers; some rows equal, some zero."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((40, dimension))
    vectors = centers[rng.integers(0, 40, count)] + 0.7 * rng.standard_normal((count, dimension))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors.astype(np.float16)
    vectors[1::97] = vectors[::97][: len(vectors[1::97])]
    vectors[5::101] = 0
    return vectors


def store_embeddings(folder, vectors, block_chunks=300):
    """Embeddings of `vectors` in a new local folder."""
    stage = StageFolder(str(folder / "embeddings"))
    blocks = []
    for i, start in enumerate(range(0, len(vectors), block_chunks)):
        path = folder / "block.npy"
        np.save(path, vectors[start : start + block_chunks])
        [stored] = stage.store(f"blocks/{i:06d}", path)
        blocks.append(asdict(stored))
    sizes = {"num_chunks": len(vectors), "block_chunks": block_chunks}
    value = {**sizes, "dimension": vectors.shape[1], "blocks": blocks}
    return Embeddings(stage.url, stage.publish("embeddings", value))


def brute_force(vectors, ids, k, own=True):
    """[N, k] by definition: products in float64, ties by id, no rows of zeros, -1 at the end; `own`
    leaves a row out of its own neighbors."""
    exact = vectors[ids].astype(np.float64) @ vectors.astype(np.float64).T
    exact[:, ~vectors.any(axis=1)] = -np.inf
    if own:
        exact[np.arange(len(ids)), ids] = -np.inf
    order = np.lexsort((np.broadcast_to(np.arange(len(vectors)), exact.shape), -exact), axis=1)
    order = order[:, :k]
    return np.where(np.take_along_axis(exact, order, 1) == -np.inf, -1, order)
