"""Stages of building an index: train on a sample, add shard i of n, merge, tune.

Each stage is an idempotent function of (task, number) that publishes a record; Dask, Slurm arrays
or a shell loop may schedule it. The embed stage before them is in `indexing/embeddings.py`.
"""

import logging
from dataclasses import asdict, dataclass
from typing import Any

from etl.storage import StageFolder, StorageError, StoredFile, scratch_folder
from indexing import faiss_index
from indexing.built_index import NAME, BuiltIndex
from indexing.embeddings import open_embeddings
from indexing.exact_search import exact_searcher
from indexing.recall import Recall, sample_recall
from indexing.recall import tune as tune_nprobe

log = logging.getLogger(__name__)
DEFAULT_TARGET_RECALL = 0.98


@dataclass(frozen=True)
class IndexTask:
    """What a worker needs for any stage; picklable. `details` go into the manifest; indexed_chunks
    are the chunk ids 0..n-1 that enter the index."""

    folder: StageFolder
    embeddings_url: str
    factory: str
    metric: str
    train_index_size: int
    seed: int
    nprobe: int | None
    target_recall: float | None
    total_shards: int
    merge_shards: bool
    indexed_chunks: int
    recall_sample: int
    recall_k: int
    device: str
    details: dict[str, Any]

    def shard_record(self, shard_id: int) -> str:
        return f"shards/{shard_id:05d}-of-{self.total_shards:05d}"

    @property
    def stages(self) -> dict[str, tuple[str, int]]:
        """Patterns and numbers of records, for `indexing/stage_status.py`."""
        shards = (f"shards/*-of-{self.total_shards:05d}", self.total_shards)
        last = (NAME.removesuffix(".json"), 1)
        return {"train": ("trained", 1), "add": shards, "merge": ("merged", 1), "tune": last}


def train(task: IndexTask, _: int = 0) -> dict[str, Any]:
    """Trains the empty index on a seeded sample."""
    record = task.folder.record("trained")
    if record is not None:
        return record
    embeddings = open_embeddings(task.embeddings_url)
    index = faiss_index.train_index(
        task.factory,
        task.metric,
        embeddings,
        task.indexed_chunks,
        task.train_index_size,
        task.seed,
    )
    given = {"nprobe": task.nprobe, "target_recall": task.target_recall}
    for name, value in given.items():
        if value is not None and not faiss_index.has_lists(index):
            raise faiss_index.IndexBuildError(
                f"{name} is {value}, but {task.factory!r} has no inverted lists to visit"
            )
    return task.folder.publish("trained", {"files": {"index": _store(task, index, "trained")}})


def _earlier(task: IndexTask, name: str, stage: str) -> dict[str, Any]:
    """What an earlier stage recorded.

    Raises:
        StorageError: it has not finished.
    """
    record = task.folder.record(name)
    if record is None:
        raise StorageError(f"{task.folder.url}: no {name} index; run the {stage} stage first")
    return record


def add(task: IndexTask, shard_id: int) -> dict[str, Any]:
    """Adds the vectors of shard `shard_id` of total_shards to a copy of the trained index.

    Raises:
        StorageError: the train stage has not finished.
    """
    name = task.shard_record(shard_id)
    record = task.folder.record(name)
    if record is not None:
        return record
    trained = _earlier(task, "trained", "train")
    index = _read(task, trained)
    start, stop = faiss_index.shard_range(task.indexed_chunks, task.total_shards, shard_id)
    faiss_index.add_rows(index, open_embeddings(task.embeddings_url), start, stop)
    value = {
        "files": {"index": _store(task, index, name)},
        "trained": trained["files"]["index"]["sha256"],
        "start": start,
        "stop": stop,
        "rows": stop - start,
        "vectors": index.ntotal,
    }
    return task.folder.publish(name, value)


def merge(task: IndexTask, _: int = 0) -> dict[str, Any]:
    """Merges all shards in order into one index, or, where that would not fit a worker's memory,
    only checks that they are all there.

    Raises:
        StorageError: a shard is missing, damaged, of another trained index, or holds other chunks
            than its number says; or no chunk has a vector.
    """
    record = task.folder.record("merged")
    if record is not None:
        return record
    shards = _shard_records(task)
    vectors = sum(shard["vectors"] for shard in shards)
    if vectors == 0:
        raise StorageError(
            f"{task.embeddings_url}: no vectors to index, all {task.indexed_chunks} chunks are "
            "without text; look at the dataset they were made from"
        )
    if task.merge_shards:
        index = faiss_index.merge_indexes(_read(task, shard) for shard in shards)
        if index.ntotal != vectors:
            raise StorageError(
                f"{task.folder.url}: the merged index holds {index.ntotal} vectors, its shards "
                f"{vectors}; delete the folder and build it again"
            )
        files = {"index": _store(task, index, "index")}
    else:
        files = {f"index-{i:05d}": shard["files"]["index"] for i, shard in enumerate(shards)}
    return task.folder.publish("merged", {"files": files, "vectors": vectors})


def _shard_records(task: IndexTask) -> list[dict[str, Any]]:
    """The records of all shards, in order, checked against each other."""
    names = [task.shard_record(i) for i in range(task.total_shards)]
    shards = task.folder.all_records(names, "add these shards first")
    trained = (task.folder.record("trained") or {}).get("files", {}).get("index", {}).get("sha256")
    for i, shard in enumerate(shards):
        expected = faiss_index.shard_range(task.indexed_chunks, task.total_shards, i)
        if (shard["start"], shard["stop"]) != expected:
            raise StorageError(
                f"{task.folder.path_of(names[i])}.json holds chunks {shard['start']}.."
                f"{shard['stop'] - 1}, expected {expected[0]}..{expected[1] - 1}; delete it and "
                "add the shard again"
            )
        if shard["trained"] != trained:
            raise StorageError(
                f"{task.folder.path_of(names[i])}.json was added to the trained index "
                f"{shard['trained'][:16]}, expected {str(trained)[:16]}; delete it and add the "
                "shard again"
            )
    return shards


def tune(task: IndexTask, _: int = 0) -> dict[str, Any]:
    """Measures recall against exact search, chooses nprobe for the target recall if none was given,
    and publishes the index manifest: from here on the index exists.

    Raises:
        StorageError: the merge stage has not finished.
    """
    name = NAME.removesuffix(".json")
    manifest = task.folder.record(name)
    if manifest is not None:
        return manifest
    merged = _earlier(task, "merged", "merge")
    described = {
        **task.details,
        "files": merged["files"],
        "factory": task.factory,
        "metric": task.metric,
        "nprobe": None,
        "vectors": merged["vectors"],
        "indexed_chunks": task.indexed_chunks,
        "embeddings": task.embeddings_url.rstrip("/").rpartition("/")[2],
    }
    nprobe, recall, curve = _measure(task, BuiltIndex(task.folder.url, described))
    value = {
        **described,
        "nprobe": nprobe,
        "recall": recall.json,
        "recall_by_nprobe": [{"nprobe": at, **found.json} for at, found in curve],
    }
    task.folder.remove_scratch()
    return task.folder.publish(name, value)


def _measure(
    task: IndexTask, built: BuiltIndex
) -> tuple[int | None, Recall, list[tuple[int, Recall]]]:
    embeddings = open_embeddings(task.embeddings_url)
    exact = exact_searcher(embeddings, task.indexed_chunks, task.device)
    sample = sample_recall(embeddings, exact, task.recall_sample, task.recall_k, task.seed + 1)
    lists = built.num_lists()
    if not lists:
        recall, nprobe, curve = sample.measure(built.searcher(None, task.device)), None, []
    elif task.nprobe is not None:
        nprobe = task.nprobe
        recall, curve = sample.measure(built.searcher(nprobe, task.device)), []
    else:
        target = task.target_recall or DEFAULT_TARGET_RECALL
        open_at = lambda at: built.searcher(at, task.device)
        nprobe, curve = tune_nprobe(sample, open_at, lists, target)
        recall = dict(curve)[nprobe]
    at = "" if nprobe is None else f" with nprobe {nprobe}"
    found = f"{recall.recall_at_k:.4f} +- {recall.half_width_95:.4f}"
    log.info("recall@%d%s: %s over %d chunks", recall.k, at, found, recall.queries)
    return nprobe, recall, curve


def _store(task: IndexTask, index: Any, stem: str) -> dict[str, Any]:
    with scratch_folder(task.folder.url) as scratch:
        path = scratch / "index.faiss"
        faiss_index.write_index(index, path)
        [stored] = task.folder.store(stem, path)
    return asdict(stored)


def _read(task: IndexTask, record: dict[str, Any]) -> Any:
    """The index of a record, in memory, its bytes checked."""
    return faiss_index.read_index(
        task.folder.fetch_verified(StoredFile(**record["files"]["index"])), mapped=False
    )
