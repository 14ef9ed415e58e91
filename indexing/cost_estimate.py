"""What a plan will take, in seconds of one core or GPU, from rates measured here and now."""

import time
from typing import Any

import numpy as np

from etl.dataset import Dataset
from indexing.embedder import EmbedderConfig, load_embedder
from indexing.embeddings import chunk_texts, dataset_tokenizer
from indexing.faiss_index import lists_in_factory
from indexing.index_build import IndexTask
from indexing.map_build import MapTask

_SAMPLE = 256
_KMEANS_ROUNDS = 10
_ROWS = 2048


def embedding_rate(dataset: Dataset, embedder: EmbedderConfig) -> float:
    """Chunks a second, measured on the dataset's own chunks (the first call loads the model)."""
    model = load_embedder(embedder)
    ids = np.linspace(0, dataset.num_chunks - 1, min(_SAMPLE, dataset.num_chunks)).astype(np.int64)
    tokens = dataset.get_chunk(ids, continuation=False)
    texts = chunk_texts(tokens, dataset_tokenizer(dataset))
    model.embed(texts[:8])
    started = time.perf_counter()
    model.embed(texts)
    return len(texts) / (time.perf_counter() - started)


def product_rate(dimension: int) -> float:
    """Multiplications and additions a second of a matrix product with rows of `dimension`."""
    rows = np.random.default_rng(0).standard_normal((_ROWS, dimension), np.float32)
    started = time.perf_counter()
    for _ in range(4):
        np.matmul(rows, rows.T)
    return 4 * 2.0 * _ROWS * _ROWS * dimension / (time.perf_counter() - started)


def estimate_index(dataset: Dataset, embedder: EmbedderConfig, task: IndexTask) -> dict[str, Any]:
    """Seconds of the stages of an index build, rounded."""
    dimension, vectors = task.details["dimension"], task.indexed_chunks
    rate, lists = product_rate(dimension), lists_in_factory(task.factory)
    sample = min(task.train_index_size, vectors)
    products = {
        "train": 2.0 * sample * lists * dimension * _KMEANS_ROUNDS,
        "add": 2.0 * vectors * lists * dimension,
        "tune": 2.0 * min(task.recall_sample, vectors) * vectors * dimension,
    }
    seconds = {stage: round(product / rate, 1) for stage, product in products.items()}
    return {"embed": round(dataset.num_chunks / embedding_rate(dataset, embedder), 1), **seconds}


def estimate_map(
    dataset: Dataset, task: MapTask, factory: str, nprobe: int | None, vectors: int
) -> dict[str, Any]:
    """Seconds of the search for all chunks of a dataset, rounded; and, if none of them could be
    copied, of their embedding."""
    dimension, lists = task.details["dimension"], lists_in_factory(factory)
    compared = lists + (nprobe or 1) * vectors / lists if lists else vectors
    product = 2.0 * dataset.num_chunks * compared * dimension
    embed = dataset.num_chunks / embedding_rate(dataset, task.queries.embedder)
    return {
        "embed_at_most": round(embed, 1),
        "search": round(product / product_rate(dimension), 1),
    }
