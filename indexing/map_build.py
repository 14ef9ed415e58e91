"""Stages of building a KNN map: search query shard i of n, merge.

Queries are the embeddings of the training dataset's chunks; the index holds the retrieval
dataset's. Both stages are idempotent functions that publish a record.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etl.dataset import Dataset
from etl.storage import StageFolder, StorageError, StoredFile, scratch_folder
from indexing import faiss_index, knn_map
from indexing.embeddings import open_embeddings
from indexing.index_build import open_index
from indexing.knn_manifest import NAME
from indexing.neighbors import NeighborFinder


@dataclass(frozen=True)
class MapTask:
    """What a worker needs to search any query shard; picklable. `details` go into the manifest."""

    folder: StageFolder
    dataset_url: str
    queries_url: str
    index_url: str
    retrieval_url: str
    k: int
    margin: int
    nprobe: int | None
    remove_duplicate: bool
    total_shards: int
    details: dict[str, Any]

    def shard_record(self, shard_id: int) -> str:
        return f"shards/{shard_id:05d}-of-{self.total_shards:05d}"


@lru_cache(maxsize=1)
def neighbor_finder(
    index_url: str, retrieval_url: str, margin: int, nprobe: int | None
) -> NeighborFinder:
    """Search over a finished index with everything that defines a neighbor; one a process."""
    built = open_index(index_url)
    index, retrieval = built.load(nprobe), Dataset(retrieval_url)
    embeddings = open_embeddings(built.embeddings_url)

    def search(
        queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return faiss_index.search_index(index, queries, k)

    return NeighborFinder(search, embeddings.rows, retrieval.chunk_keys, index.ntotal, margin)


def search(task: MapTask, shard_id: int) -> dict[str, Any]:
    """Finds the neighbors of query shard `shard_id` of total_shards and stores them as a map of its
    own."""
    name = task.shard_record(shard_id)
    record = task.folder.record(name)
    if record is not None:
        return record
    dataset, queries = Dataset(task.dataset_url), open_embeddings(task.queries_url)
    start, stop = faiss_index.shard_range(dataset.num_chunks, task.total_shards, shard_id)
    finder = neighbor_finder(task.index_url, task.retrieval_url, task.margin, task.nprobe)
    chunk_ids = np.arange(start, stop)
    own_keys = dataset.chunk_keys(chunk_ids) if task.remove_duplicate else None
    ids, scores = finder.find(queries.rows(chunk_ids), task.k, own_keys)
    with scratch_folder(task.folder.url) as scratch:
        with open(scratch / "map.knn", "wb") as file:
            knn_map.write_knn_map(file, ids, start)
        np.save(scratch / "map.scores.npy", scores.astype(np.float16))
        map_file, scores_file = task.folder.store(
            name, scratch / "map.knn", scratch / "map.scores.npy"
        )
    files = {"map": asdict(map_file), "scores": asdict(scores_file)}
    return task.folder.publish(
        name, {"files": files, "rows": len(ids), "filled": int((ids >= 0).sum())}
    )


def merge(task: MapTask, _: int = 0) -> dict[str, Any]:
    """Joins all shards to one NeMo-readable map, publishes the manifest.

    Raises:
        StorageError: a shard is missing.
    """
    manifest = task.folder.record(NAME.removesuffix(".json"))
    if manifest is not None:
        return manifest
    found = [task.folder.record(task.shard_record(i)) for i in range(task.total_shards)]
    records = [record for record in found if record is not None]
    if len(records) < task.total_shards:
        missing = [i for i, record in enumerate(found) if record is None]
        raise StorageError(
            f"{task.folder.url}: shards {missing[:5]} of {task.total_shards} are missing; search "
            "them first"
        )
    paths = [task.folder.fetch(StoredFile(**record["files"]["map"])) for record in records]
    scores = [
        np.load(task.folder.fetch(StoredFile(**record["files"]["scores"]))) for record in records
    ]
    with scratch_folder(task.folder.url) as scratch:
        with open(scratch / "map.knn", "wb") as file:
            knn_map.merge([knn_map.KNNMap(path) for path in paths], file)
        np.save(scratch / "map.scores.npy", np.concatenate(scores))
        map_file, scores_file = task.folder.store(
            "knn_map", scratch / "map.knn", scratch / "map.scores.npy"
        )
    rows = sum(record["rows"] for record in records)
    filled = sum(record["filled"] for record in records)
    value = {
        **task.details,
        "files": {"map": asdict(map_file), "scores": asdict(scores_file)},
        "k": task.k,
        "rows": rows,
        "fill_rate": filled / max(1, rows * task.k),
    }
    task.folder.remove_scratch()
    return task.folder.publish(NAME.removesuffix(".json"), value)
