"""Stages of building a KNN map: search query shard i of n (in each part of an index that is kept in
parts), combine, merge.

Queries are the embeddings of the training dataset's chunks; the index holds the retrieval
dataset's. All stages are idempotent functions that publish a record.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etl.dataset import Dataset
from etl.npy_file import NpyFile, write_npy
from etl.storage import StageFolder, StoredFile, scratch_folder
from indexing import faiss_index, knn_map
from indexing.built_index import open_index
from indexing.embeddings import Embeddings, EmbedTask, covering_blocks, num_blocks
from indexing.knn_manifest import NAME
from indexing.neighbors import Block, NeighborFinder, best_of


@dataclass(frozen=True)
class MapTask:
    """What a worker needs to search any query shard; picklable. `details` go into the manifest.

    index_shards: parts of the index that are searched one by one. process_chunk_size: queries
    searched at a time.
    """

    folder: StageFolder
    queries: EmbedTask
    index_url: str
    retrieval_url: str
    k: int
    margin: int
    nprobe: int | None
    remove_duplicate: bool
    total_shards: int
    index_shards: int
    process_chunk_size: int
    device: str
    details: dict[str, Any]

    def shard_record(self, shard_id: int) -> str:
        return f"shards/{shard_id:05d}-of-{self.total_shards:05d}"

    def part_record(self, shard_id: int, index_shard: int) -> str:
        return f"parts/{shard_id:05d}-of-{self.total_shards:05d}-in-{index_shard:05d}"

    @property
    def stages(self) -> dict[str, tuple[str, int]]:
        """Patterns and numbers of records, for `indexing/stage_status.py`."""
        n, of = self.total_shards, f"*-of-{self.total_shards:05d}"
        parts = {"search": (f"parts/{of}-in-*", n * self.index_shards)}
        last = (NAME.removesuffix(".json"), 1)
        if self.index_shards == 1:
            return {"search": (f"shards/{of}", n), "merge": last}
        return {**parts, "combine": (f"shards/{of}", n), "merge": last}


@lru_cache(maxsize=1)
def neighbor_finder(
    index_url: str,
    retrieval_url: str,
    margin: int,
    nprobe: int | None,
    device: str = "cpu",
    index_shard: int | None = None,
) -> NeighborFinder:
    """Search in a finished index, or one part of it, with all that defines a neighbor; one a
    process."""
    built, retrieval = open_index(index_url), Dataset(retrieval_url)
    searcher = built.searcher(nprobe, device, index_shard)
    keys, spans = retrieval.chunk_keys, retrieval.chunk_spans
    return NeighborFinder(searcher, built.embeddings.rows, keys, margin, spans)


def search(task: MapTask, number: int) -> dict[str, Any]:
    """Finds the neighbors of query shard number % total_shards in part number // total_shards of
    the index and stores them: as a map of their own if there is one part."""
    index_shard, shard_id = divmod(number, task.total_shards)
    in_parts = task.index_shards > 1
    name = task.part_record(shard_id, index_shard) if in_parts else task.shard_record(shard_id)
    record = task.folder.record(name)
    if record is not None:
        return record
    part = index_shard if in_parts else None
    finder = neighbor_finder(
        task.index_url, task.retrieval_url, task.margin, task.nprobe, task.device, part
    )
    start, stop = _range(task, shard_id)
    if in_parts:
        found = _joined(_find(task, finder, start, stop), task.k)
        return _publish_part(task, name, *found)
    return _publish_shard(task, name, start, stop, _find(task, finder, start, stop))


def _range(task: MapTask, shard_id: int) -> tuple[int, int]:
    num_chunks = Dataset(task.queries.dataset_url).num_chunks
    return faiss_index.shard_range(num_chunks, task.total_shards, shard_id)


def _find(task: MapTask, finder: NeighborFinder, start: int, stop: int) -> Iterator[Block]:
    """(ids, scores) of the chunks start..stop-1, process_chunk_size at a time."""
    dataset = Dataset(task.queries.dataset_url)
    queries = query_embeddings(task.queries, dataset.num_chunks, start, stop)
    for first in range(start, stop, task.process_chunk_size):
        chunk_ids = np.arange(first, min(first + task.process_chunk_size, stop))
        own_keys = dataset.chunk_keys(chunk_ids) if task.remove_duplicate else None
        yield finder.find(queries.rows(chunk_ids), task.k, own_keys)


def _joined(blocks: Iterator[Block], k: int) -> Block:
    ids, scores = zip((np.empty((0, k), np.int64), np.empty((0, k))), *blocks, strict=True)
    return np.concatenate(ids), np.concatenate(scores)


def query_embeddings(task: EmbedTask, num_chunks: int, start: int, stop: int) -> Embeddings:
    """The vectors of chunks start..stop-1, whose blocks must be embedded; others need not be.

    Raises:
        StorageError: a block is missing.
    """
    blocks: list[dict[str, Any] | None] = [None] * num_blocks(num_chunks, task.block_chunks)
    needed = covering_blocks(start, stop, task.block_chunks)
    names = [task.record_name(block) for block in needed]
    records = task.folder.all_records(names, "run the search stage, which embeds what it needs")
    for block, record in zip(needed, records, strict=True):
        blocks[block] = record["files"]["vectors"]
    sizes = {"num_chunks": num_chunks, "block_chunks": task.block_chunks}
    return Embeddings(task.folder.url, {**task.details, **sizes, "blocks": blocks})


def _publish_part(
    task: MapTask, name: str, ids: NDArray[np.int64], scores: NDArray[np.float64]
) -> dict[str, Any]:
    with scratch_folder(task.folder.url) as scratch:
        write_npy(scratch / "part.ids.npy", ids)
        write_npy(scratch / "part.scores.npy", scores)
        stored = task.folder.store(name, scratch / "part.ids.npy", scratch / "part.scores.npy")
    files = {"ids": asdict(stored[0]), "scores": asdict(stored[1])}
    return task.folder.publish(name, {"files": files, "rows": len(ids)})


def _publish_shard(
    task: MapTask, name: str, start: int, stop: int, blocks: Iterator[Block]
) -> dict[str, Any]:
    """Writes rows as they come: memory does not grow with the shard."""
    filled = 0
    with scratch_folder(task.folder.url) as scratch:
        paths = [scratch / "map.knn", scratch / "map.scores.npy"]
        scores = NpyFile(paths[1], np.dtype(np.float16), (task.k,))
        with open(paths[0], "wb") as file:
            knn_map.write_header(file, task.k, stop - start, start)
            for ids, found in blocks:
                knn_map.write_rows(file, ids)
                scores.append(found)
                filled += int((ids >= 0).sum())
        scores.close()
        map_file, scores_file = task.folder.store(name, *paths)
    files = {"map": asdict(map_file), "scores": asdict(scores_file)}
    return task.folder.publish(name, {"files": files, "rows": stop - start, "filled": filled})


def combine(task: MapTask, shard_id: int) -> dict[str, Any]:
    """Joins what the parts of the index gave for a query shard to the best K of all.

    Raises:
        StorageError: a part is missing.
    """
    name = task.shard_record(shard_id)
    record = task.folder.record(name)
    if record is not None:
        return record
    names = [task.part_record(shard_id, j) for j in range(task.index_shards)]
    records = task.folder.all_records(names, "search these parts first")
    columns = [[_load(task, part["files"][kind]) for part in records] for kind in ("ids", "scores")]
    start, stop = _range(task, shard_id)
    blocks = (
        best_of([(ids[rows], scores[rows]) for ids, scores in zip(*columns, strict=True)])
        for first in range(0, stop - start, task.process_chunk_size)
        for rows in [slice(first, first + task.process_chunk_size)]
    )
    return _publish_shard(task, name, start, stop, blocks)


def _load(task: MapTask, file: dict[str, Any]) -> NDArray[Any]:
    path = task.folder.fetch_verified(StoredFile(**file))
    return np.load(path, mmap_mode="r", allow_pickle=False)


def merge(task: MapTask, _: int = 0) -> dict[str, Any]:
    """Joins all shards to one NeMo-readable map, publishes the manifest: from here on the map
    exists. Rows are copied through the page cache.

    Raises:
        StorageError: a shard is missing or damaged.
    """
    manifest = task.folder.record(NAME.removesuffix(".json"))
    if manifest is not None:
        return manifest
    names = [task.shard_record(i) for i in range(task.total_shards)]
    records = task.folder.all_records(names, "search these shards first")
    rows = sum(record["rows"] for record in records)
    with scratch_folder(task.folder.url) as scratch:
        paths = [scratch / "map.knn", scratch / "map.scores.npy"]
        _write_merged(task, records, paths)
        map_file, scores_file = task.folder.store("knn_map", *paths)
    value = {
        **task.details,
        "files": {"map": asdict(map_file), "scores": asdict(scores_file)},
        "k": task.k,
        "rows": rows,
        "fill_rate": sum(record["filled"] for record in records) / max(1, rows * task.k),
    }
    task.folder.remove_scratch()
    return task.folder.publish(NAME.removesuffix(".json"), value)


def _write_merged(task: MapTask, records: list[dict[str, Any]], paths: list[Path]) -> None:
    files = [StoredFile(**record["files"]["map"]) for record in records]
    parts = [knn_map.KNNMap(task.folder.fetch_verified(file)) for file in files]
    with open(paths[0], "wb") as file:
        knn_map.merge(parts, file)
    scores = NpyFile(paths[1], np.dtype(np.float16), (task.k,))
    for record in records:
        scores.append(_load(task, record["files"]["scores"]))
    scores.close()
