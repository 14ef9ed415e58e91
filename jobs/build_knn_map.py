"""knn | `python -m jobs.build_knn_map {search,merge,all,status}` | Dask | reads a training (or
held-out) dataset, the index and its retrieval dataset | writes KNN map shards, one KNN map.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from etl.dataset import Dataset, check_no_leak
from etl.storage import StageFolder, StorageError, content_key, join_url
from indexing import map_build
from indexing.built_index import BuiltIndex, open_index
from indexing.cluster import ClusterConfig, open_runner
from indexing.embedder import EmbedderConfig, embedder_facts
from indexing.embeddings import EmbedTask, covering_blocks, num_blocks
from indexing.faiss_index import shard_range
from indexing.runner import Runner
from indexing.stage_status import announce, read_status
from jobs.build_index import cluster_of, embed_blocks, embed_dataset, plan_embedding
from jobs.command_line import run_job


@dataclass(frozen=True)
class BuildKNNMapConfig:
    """For every chunk of a dataset, its neighbors in the index.

    Attributes:
        stage: search embeds the chunks (those of documents that are indexed too are not embedded
            twice) and searches; merge joins the shards; all does both. A stage that is finished
            does nothing. status tells how far they are. merge and single shards run in this
            process, without Dask, unless a scheduler_address is given.
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
        remove_duplicate: Chunks of a query's own document, or of a near-duplicate of it, are not
            its neighbors.
        dedup_margin: Candidates asked for beyond what the map holds; rows that need more are
            searched again.
        process_chunk_size: Queries that a worker searches at a time.
        nprobe: Inverted lists a query visits, instead of the index's default; only for an index
            that has them.
        device: Where the search runs: cpu or a CUDA device.
        total_shards: Query shards that are searched independently and then merged.
        shard_id: With stage search: only this shard, as one of several independent jobs.
        cluster: Where tasks run.
        dry_run: Check the inputs, print the plan with sizes and seconds, and write nothing.
    """

    stage: Literal["search", "merge", "all", "status"]
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
    process_chunk_size: int = 16384
    nprobe: int | None = None
    device: str = "cpu"
    total_shards: int = 1
    shard_id: int | None = None
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    dry_run: bool = False


def run(config: BuildKNNMapConfig) -> dict[str, Any]:
    dataset = Dataset(config.dataset_url)
    _check_numbers(config)
    if config.stage == "status":
        return {"folders": read_status(config.output_url, dataset.manifest.fingerprint)}
    retrieval, index = Dataset(config.retrieval_url), open_index(config.index_url)
    _check_parents(config, dataset, retrieval, index)
    if config.dry_run:
        return _describe(config, dataset, retrieval, index)
    cluster = cluster_of(config.cluster, config.stage != "merge", config.shard_id)
    with open_runner(cluster, join_url(config.output_url, "reports")) as runner:
        facts = runner.call(embedder_facts, config.embedder)
        task = _map_task(config, dataset, retrieval, index, facts)
        announce(task.folder, "knn", dataset.manifest.fingerprint, task.stages)
        manifest: dict[str, Any] = {}
        if config.stage != "merge":
            _search(runner, config, dataset, task)
        if config.stage != "search":
            manifest = _merge(runner, task)
    summary = {key: manifest[key] for key in ("k", "rows", "fill_rate") if key in manifest}
    return {"map_url": task.folder.url, **summary}


def _search(
    runner: Runner, config: BuildKNNMapConfig, dataset: Dataset, task: map_build.MapTask
) -> None:
    if config.shard_id is None:
        embed_dataset(runner, task.queries, dataset.num_chunks)
        shards = range(config.total_shards)
    else:
        start, stop = shard_range(dataset.num_chunks, config.total_shards, config.shard_id)
        blocks = covering_blocks(start, stop, config.block_chunks)
        embed_blocks(runner, task.queries, dataset.num_chunks, blocks)
        shards = range(config.shard_id, config.shard_id + 1)
    # One part of the index after the other, so that a worker opens each only once.
    numbers = [
        part * config.total_shards + shard for part in range(task.index_shards) for shard in shards
    ]
    runner.run(map_build.search, task, numbers, "search")


def _merge(runner: Runner, task: map_build.MapTask) -> dict[str, Any]:
    if task.index_shards > 1:
        runner.run(map_build.combine, task, range(task.total_shards), "combine")
    return runner.run(map_build.merge, task, [0], "merge")[0]


def _check_numbers(config: BuildKNNMapConfig) -> None:
    least = {
        "K_neighbors": 1,
        "spare_neighbors": 0,
        "dedup_margin": 0,
        "process_chunk_size": 1,
        "total_shards": 1,
        "block_chunks": 1,
    }
    for name, bound in least.items():
        if getattr(config, name) < bound:
            raise ValueError(f"{name} is {getattr(config, name)}; expected at least {bound}")
    if config.shard_id is not None and config.stage != "search":
        raise ValueError(
            f"shard_id names one shard for stage search; it has no effect on stage {config.stage}"
        )


def _check_parents(
    config: BuildKNNMapConfig, dataset: Dataset, retrieval: Dataset, index: BuiltIndex
) -> None:
    """Refuses an index of another dataset, datasets of different tokenizers, held-out documents
    that are indexed, and more neighbors than there are vectors."""
    expected, found = index.manifest["dataset_fingerprint"], retrieval.manifest.fingerprint
    if expected != found:
        raise StorageError(
            f"{index.url} was built from the dataset {expected}, but {retrieval.url} is {found}; "
            "name the retrieval dataset that was indexed, or build its index"
        )
    ours, theirs = dataset.manifest.tokenizer_fingerprint, retrieval.manifest.tokenizer_fingerprint
    if ours != theirs:
        raise StorageError(
            f"{dataset.url} has tokenizer {ours}, {retrieval.url} has {theirs}; expected the same: "
            "prepare both with one tokenizer"
        )
    k = config.K_neighbors + config.spare_neighbors
    if k > index.manifest["vectors"]:
        raise ValueError(
            f"K_neighbors + spare_neighbors is {k}, but {index.url} holds only "
            f"{index.manifest['vectors']} vectors; ask for fewer"
        )
    check_no_leak(dataset, retrieval)


def _map_task(
    config: BuildKNNMapConfig,
    dataset: Dataset,
    retrieval: Dataset,
    index: BuiltIndex,
    facts: dict[str, Any],
) -> map_build.MapTask:
    queries = _query_task(config, dataset, retrieval, index, facts)
    details = {
        "training_fingerprint": dataset.manifest.fingerprint,
        "retrieval_fingerprint": retrieval.manifest.fingerprint,
        "index_fingerprint": index.fingerprint,
        "split": dataset.manifest.split,
        "K_neighbors": config.K_neighbors,
        "remove_duplicate": config.remove_duplicate,
        "nprobe": config.nprobe or index.manifest["nprobe"],
        "device": config.device.partition(":")[0],
        "dimension": facts["dimension"],
    }
    numbers = (config.spare_neighbors, config.dedup_margin, config.block_chunks)
    key = content_key(details, facts["embedder_fingerprint"], *numbers)[:16]
    return map_build.MapTask(
        folder=StageFolder(join_url(config.output_url, f"knn-{key}")),
        queries=queries,
        index_url=index.url,
        retrieval_url=retrieval.url,
        k=config.K_neighbors + config.spare_neighbors,
        margin=config.dedup_margin,
        nprobe=config.nprobe,
        remove_duplicate=config.remove_duplicate,
        total_shards=config.total_shards,
        index_shards=len(index.files),
        process_chunk_size=config.process_chunk_size,
        device=config.device,
        details=details,
    )


def _query_task(
    config: BuildKNNMapConfig,
    dataset: Dataset,
    retrieval: Dataset,
    index: BuiltIndex,
    facts: dict[str, Any],
) -> EmbedTask:
    if facts["embedder_fingerprint"] != index.manifest["embedder_fingerprint"]:
        raise StorageError(
            f"{config.index_url} was built with embedder {index.manifest['embedder']} "
            f"({index.manifest['embedder_fingerprint']}), the queries would be embedded with "
            f"{facts['embedder']} "
            f"({facts['embedder_fingerprint']}); use the same embedder, dtype and batch size"
        )
    reuse = {"reuse_dataset_url": retrieval.url, "reuse_url": index.embeddings_url}
    return plan_embedding(
        dataset, config.embedder, facts, config.block_chunks, config.output_url, **reuse
    )


def _describe(
    config: BuildKNNMapConfig, dataset: Dataset, retrieval: Dataset, index: BuiltIndex
) -> dict[str, Any]:
    from indexing.cost_estimate import estimate_map

    task = _map_task(config, dataset, retrieval, index, embedder_facts(config.embedder))
    found = index.manifest
    return {
        "map_url": task.folder.url,
        "queries_url": task.queries.folder.url,
        "rows": dataset.num_chunks,
        "k": task.k,
        "map_bytes": 41 + 8 * task.k * dataset.num_chunks,
        "embedding_tasks": num_blocks(dataset.num_chunks, task.queries.block_chunks),
        "search_tasks": task.total_shards * task.index_shards,
        "core_seconds": estimate_map(
            dataset, task, found["factory"], task.details["nprobe"], found["vectors"]
        ),
    }


if __name__ == "__main__":
    run_job("Find the neighbors of a dataset's chunks on Dask workers.", BuildKNNMapConfig, run)
