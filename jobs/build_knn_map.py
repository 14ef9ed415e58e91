"""knn | `python -m jobs.build_knn_map {search,merge,all}` | Dask | reads a training (or held-out)
dataset, the index and its retrieval dataset | writes KNN map shards, one KNN map.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from etl.dataset import Dataset
from etl.manifest import HELD_OUT
from etl.storage import StageFolder, StorageError, content_key, join_url
from indexing import map_build
from indexing.cluster import ClusterConfig, dask_client, run_tasks
from indexing.embedder import EmbedderConfig, embedder_facts
from indexing.embeddings import EmbedTask, num_blocks
from indexing.index_build import BuiltIndex, open_index
from jobs.build_index import embed_dataset, plan_embedding
from jobs.command_line import run_job


@dataclass(frozen=True)
class BuildKNNMapConfig:
    """For every chunk of a dataset, its neighbors in the index.

    Attributes:
        stage: search embeds the chunks (those of documents that are indexed too are not embedded
            twice) and searches; merge joins the shards; all does both. A stage that is finished
            does nothing.
        dataset_url: Folder of the dataset whose chunks are the queries: train, validation or test.
        index_url: Folder of the index, as jobs.build_index prints it.
        retrieval_url: Folder of the retrieval dataset that was indexed.
        output_url: Folder for embeddings and maps; each configuration gets a folder of its own
            inside.
        embedder: The embedder of the index.
        block_chunks: Chunks of one embedding task and file.
        K_neighbors: Neighbors a chunk is to have in training.
        spare_neighbors: More of them in the map, for samples that ban documents besides the chunk's
            own.
        remove_duplicate: Chunks of a query's own document are not its neighbors.
        dedup_margin: Candidates asked for beyond what the map holds; rows that need more are
            searched again.
        nprobe: Inverted lists a query visits, instead of the index's default; only for an index
            that has them.
        total_shards: Query shards that are searched independently and then merged.
        shard_id: With stage search: only this shard, as one of several independent jobs.
        cluster: The Dask cluster.
        dry_run: Check the inputs, print the plan with sizes and write nothing.
    """

    stage: Literal["search", "merge", "all"]
    dataset_url: str
    index_url: str
    retrieval_url: str
    output_url: str
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    block_chunks: int = 8192
    K_neighbors: int = 2
    spare_neighbors: int = 6
    remove_duplicate: bool = True
    dedup_margin: int = 16
    nprobe: int | None = None
    total_shards: int = 1
    shard_id: int | None = None
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    dry_run: bool = False


def run(config: BuildKNNMapConfig) -> dict[str, Any]:
    dataset, retrieval, index = (
        Dataset(config.dataset_url),
        Dataset(config.retrieval_url),
        open_index(config.index_url),
    )
    _check_numbers(config)
    _check_parents(dataset, retrieval, index)
    if config.dry_run:
        return _describe(
            dataset, *_tasks(config, dataset, retrieval, index, embedder_facts(config.embedder))
        )
    with dask_client(config.cluster) as client:
        facts = client.submit(embedder_facts, config.embedder, pure=False).result()
        embed_task, task = _tasks(config, dataset, retrieval, index, facts)
        manifest: dict[str, Any] = {}
        if config.stage != "merge":
            embed_dataset(client, embed_task, dataset.num_chunks)
            shards = range(config.total_shards) if config.shard_id is None else [config.shard_id]
            run_tasks(client, map_build.search, task, shards, "search")
        if config.stage != "search":
            [manifest] = run_tasks(client, map_build.merge, task, [0], "merge")
    summary = {key: manifest[key] for key in ("k", "rows", "fill_rate") if key in manifest}
    return {"map_url": task.folder.url, **summary}


def _check_numbers(config: BuildKNNMapConfig) -> None:
    if config.K_neighbors < 1 or config.spare_neighbors < 0 or config.dedup_margin < 0:
        raise ValueError(
            f"K_neighbors {config.K_neighbors}, spare_neighbors {config.spare_neighbors}, "
            "dedup_margin "
            f"{config.dedup_margin}; expected at least 1, 0 and 0"
        )
    if config.shard_id is not None and config.stage != "search":
        raise ValueError(
            f"shard_id names one shard for stage search; it has no effect on stage {config.stage}"
        )


def _check_parents(dataset: Dataset, retrieval: Dataset, index: BuiltIndex) -> None:
    """Refuses an index of another dataset, datasets of different tokenizers, and held-out documents
    that are indexed."""
    expected, found = index.manifest["dataset_fingerprint"], retrieval.manifest.fingerprint
    if expected != found:
        raise StorageError(
            f"{index.url} was built from the dataset {expected}, but {retrieval.url} is {found}"
        )
    ours, theirs = dataset.manifest.tokenizer_fingerprint, retrieval.manifest.tokenizer_fingerprint
    if ours != theirs:
        raise StorageError(
            f"{dataset.url} has tokenizer {ours}, {retrieval.url} has {theirs}; expected the same"
        )
    if dataset.manifest.split in HELD_OUT:
        leaked = np.isin(dataset.document_keys, retrieval.document_keys)
        if leaked.any():
            raise StorageError(
                f"{leaked.sum()} of {len(leaked)} documents of the {dataset.manifest.split} "
                f"dataset {dataset.url} are in "
                f"the retrieval dataset {retrieval.url}; held-out documents must not be retrievable"
            )


def _tasks(
    config: BuildKNNMapConfig,
    dataset: Dataset,
    retrieval: Dataset,
    index: BuiltIndex,
    facts: dict[str, Any],
) -> tuple[EmbedTask, map_build.MapTask]:
    if facts["embedder_fingerprint"] != index.manifest["embedder_fingerprint"]:
        raise StorageError(
            f"{config.index_url} was built with embedder {index.manifest['embedder']} "
            f"({index.manifest['embedder_fingerprint']}), the queries would be embedded with "
            f"{facts['embedder']} "
            f"({facts['embedder_fingerprint']}); use the same embedder, dtype and batch size"
        )
    reuse = {"reuse_dataset_url": retrieval.url, "reuse_url": index.embeddings_url}
    embed_task = plan_embedding(
        dataset, config.embedder, facts, config.block_chunks, config.output_url, **reuse
    )
    return embed_task, _map_task(config, dataset, retrieval, index, embed_task)


def _map_task(
    config: BuildKNNMapConfig,
    dataset: Dataset,
    retrieval: Dataset,
    index: BuiltIndex,
    embed_task: EmbedTask,
) -> map_build.MapTask:
    details = {
        "training_fingerprint": dataset.manifest.fingerprint,
        "retrieval_fingerprint": retrieval.manifest.fingerprint,
        "index_fingerprint": index.fingerprint,
        "split": dataset.manifest.split,
        "K_neighbors": config.K_neighbors,
        "remove_duplicate": config.remove_duplicate,
        "nprobe": config.nprobe or index.manifest["nprobe"],
    }
    key = content_key(details, config.spare_neighbors, config.dedup_margin, config.block_chunks)[
        :16
    ]
    return map_build.MapTask(
        folder=StageFolder(join_url(config.output_url, f"knn-{key}")),
        dataset_url=dataset.url,
        queries_url=embed_task.folder.url,
        index_url=index.url,
        retrieval_url=retrieval.url,
        k=config.K_neighbors + config.spare_neighbors,
        margin=config.dedup_margin,
        nprobe=config.nprobe,
        remove_duplicate=config.remove_duplicate,
        total_shards=config.total_shards,
        details=details,
    )


def _describe(dataset: Dataset, embed_task: EmbedTask, task: map_build.MapTask) -> dict[str, Any]:
    return {
        "map_url": task.folder.url,
        "queries_url": embed_task.folder.url,
        "rows": dataset.num_chunks,
        "k": task.k,
        "map_bytes": 41 + 8 * task.k * dataset.num_chunks,
        "embedding_tasks": num_blocks(dataset.num_chunks, embed_task.block_chunks),
        "search_tasks": task.total_shards,
    }


if __name__ == "__main__":
    run_job("Find the neighbors of a dataset's chunks on Dask workers.", BuildKNNMapConfig, run)
