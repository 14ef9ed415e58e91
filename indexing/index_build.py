"""Stages of building an index: train on a sample, add shard i of n, merge, measure recall.

Each stage is an idempotent function of (task, shard number) that publishes a record; Dask, Slurm
arrays or a shell loop may schedule it. The embed stage before them is in `indexing/embeddings.py`.
"""

from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np

from etl.storage import StageFolder, StorageError, StoredFile, join_url, read_json, scratch_folder
from indexing import faiss_index
from indexing.embeddings import open_embeddings
from indexing.neighbors import exact_scores

NAME = "index.json"


@dataclass(frozen=True)
class IndexTask:
    """What a worker needs for any stage; picklable. `details` go into the manifest."""

    folder: StageFolder
    embeddings_url: str
    factory: str
    train_index_size: int
    seed: int
    nprobe: int | None
    total_shards: int
    recall_sample: int
    recall_k: int
    details: dict[str, Any]

    def shard_record(self, shard_id: int) -> str:
        return f"shards/{shard_id:05d}-of-{self.total_shards:05d}"


def train(task: IndexTask, _: int = 0) -> dict[str, Any]:
    """Trains the empty index on a seeded sample."""
    record = task.folder.record("trained")
    if record is not None:
        return record
    index = faiss_index.train_index(
        task.factory, open_embeddings(task.embeddings_url), task.train_index_size, task.seed
    )
    if task.nprobe is not None and not faiss_index.has_lists(index):
        raise faiss_index.IndexBuildError(
            f"nprobe is {task.nprobe}, but {task.factory!r} has no inverted lists to visit"
        )
    return task.folder.publish("trained", {"files": {"index": _store(task, index, "trained")}})


def add(task: IndexTask, shard_id: int) -> dict[str, Any]:
    """Adds the vectors of shard `shard_id` of total_shards to a copy of the trained index.

    Raises:
        StorageError: the train stage has not finished.
    """
    name = task.shard_record(shard_id)
    record = task.folder.record(name)
    if record is not None:
        return record
    trained = task.folder.record("trained")
    if trained is None:
        raise StorageError(f"{task.folder.url}: no trained index; run the train stage first")
    embeddings = open_embeddings(task.embeddings_url)
    index = _read(task, trained)
    start, stop = faiss_index.shard_range(embeddings.num_chunks, task.total_shards, shard_id)
    faiss_index.add_rows(index, embeddings, start, stop)
    files = {"index": _store(task, index, name)}
    return task.folder.publish(
        name, {"files": files, "start": start, "stop": stop, "vectors": index.ntotal}
    )


def merge(task: IndexTask, _: int = 0) -> dict[str, Any]:
    """Merges all shards in order, measures recall and publishes the index manifest.

    Raises:
        StorageError: a shard is missing.
    """
    manifest = task.folder.record(NAME.removesuffix(".json"))
    if manifest is not None:
        return manifest
    records = [task.folder.record(task.shard_record(i)) for i in range(task.total_shards)]
    missing = [i for i, record in enumerate(records) if record is None]
    if missing:
        raise StorageError(
            f"{task.folder.url}: shards {missing[:5]} of {task.total_shards} are missing; add them "
            "first"
        )
    index = faiss_index.merge_indexes(
        [_read(task, record) for record in records if record is not None]
    )
    value = {
        **task.details,
        "files": {"index": _store(task, index, "index")},
        "factory": task.factory,
        "metric": "inner_product",
        "nprobe": _nprobe(task, index),
        "vectors": index.ntotal,
        "embeddings": task.embeddings_url.rstrip("/").rpartition("/")[2],
        "recall": measure_recall(task, index),
    }
    task.folder.remove_scratch()
    return task.folder.publish(NAME.removesuffix(".json"), value)


def _nprobe(task: IndexTask, index: Any) -> int | None:
    return (task.nprobe or faiss_index.DEFAULT_NPROBE) if faiss_index.has_lists(index) else None


def measure_recall(task: IndexTask, index: Any) -> dict[str, Any]:
    """recall@k against exact search for a seeded sample of the indexed chunks, with its 95%
    half-width.

    A found chunk counts if it scores at least as high as the k-th best: ties are no misses.
    """
    embeddings = open_embeddings(task.embeddings_url)
    chosen = np.random.default_rng(task.seed + 1).permutation(embeddings.num_chunks)[
        : task.recall_sample
    ]
    queries = embeddings.rows(np.sort(chosen))
    queries = queries[np.any(queries != 0, axis=1)]
    k = min(task.recall_k, index.ntotal)
    if faiss_index.has_lists(index):
        faiss_index.set_nprobe(index, _nprobe(task, index) or 1)
    _, found = faiss_index.search_index(index, queries.astype(np.float32), k)
    _, best = faiss_index.exact_search(embeddings, queries.astype(np.float32), k)
    scores, exact = (
        exact_scores(queries, embeddings.rows(ids.ravel()).reshape(*ids.shape, -1))
        for ids in (found, best)
    )
    hits = ((scores >= exact.min(axis=1, keepdims=True)) & (found >= 0)).mean(axis=1)
    half_width = 1.96 * float(hits.std()) / sqrt(len(hits))
    return {
        "k": k,
        "recall_at_k": float(hits.mean()),
        "half_width_95": half_width,
        "queries": len(hits),
    }


def _store(task: IndexTask, index: Any, stem: str) -> dict[str, Any]:
    with scratch_folder(task.folder.url) as scratch:
        path = scratch / "index.faiss"
        faiss_index.write_index(index, path)
        [stored] = task.folder.store(stem, path)
    return asdict(stored)


def _read(task: IndexTask, record: dict[str, Any]) -> Any:
    return faiss_index.read_index(task.folder.fetch(StoredFile(**record["files"]["index"])))


@dataclass(frozen=True)
class BuiltIndex:
    """A finished index folder."""

    url: str
    manifest: dict[str, Any]

    @property
    def embeddings_url(self) -> str:
        """Embeddings of the indexed chunks, a sibling folder."""
        return join_url(self.url.rstrip("/").rpartition("/")[0], self.manifest["embeddings"])

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["files"]["index"]["sha256"])[:32]

    def load(self, nprobe: int | None = None) -> Any:
        """The Faiss index, from a checksummed local file.

        Raises:
            IndexBuildError: nprobe was given, but the index has no inverted lists.
        """
        if nprobe is not None and self.manifest["nprobe"] is None:
            raise faiss_index.IndexBuildError(
                f"nprobe is {nprobe}, but index {self.url} has no inverted lists to visit"
            )
        path = StageFolder(self.url).fetch(StoredFile(**self.manifest["files"]["index"]))
        return faiss_index.read_index(path, nprobe or self.manifest["nprobe"])


def open_index(url: str) -> BuiltIndex:
    """The finished index in a folder.

    Raises:
        FileNotFoundError: the merge stage did not finish there.
    """
    try:
        return BuiltIndex(url, read_json(join_url(url, NAME)))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{url}: no {NAME}; expected the folder that jobs.build_index prints"
        ) from None
