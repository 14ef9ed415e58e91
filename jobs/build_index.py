"""index | `python -m jobs.build_index {embed,train,add,merge,tune,all,status}` | Dask |
reads a retrieval dataset | writes embeddings, a trained index, index shards, the final Faiss index.
"""

import logging
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from etl.dataset import Dataset
from etl.storage import StageFolder, content_key, join_url
from indexing import index_build
from indexing.cluster import ClusterConfig, open_runner
from indexing.embedder import EmbedderConfig, embedder_facts
from indexing.embeddings import EmbedTask, commit_embeddings, embed_block, num_blocks
from indexing.faiss_index import shard_range
from indexing.index_choice import IndexChoice, choose_index, default_lists
from indexing.runner import Runner
from indexing.stage_status import announce, read_status
from jobs.command_line import run_job

log = logging.getLogger(__name__)
STAGES = ("embed", "train", "add", "merge", "tune")
_SHARDED = ("embed", "add")


@dataclass(frozen=True)
class BuildIndexConfig:
    """From a retrieval dataset to a Faiss index with known recall.

    Attributes:
        stage: One stage, or all of them in order; a stage that is finished does nothing. status
            tells how far they are. train, merge, tune and single shards run in this process,
            without Dask, unless a scheduler_address is given.
        dataset_url: Folder of the retrieval dataset.
        output_url: Folder for embeddings and indexes; each configuration gets a folder of its own
            inside.
        embedder: The sentence-embedding model.
        block_chunks: Chunks of one embedding task and file.
        percent: Share of the documents (the first ones) that are indexed, above 0 and at most 1.
        faiss_factory: Faiss factory string; by default chosen from the number of vectors,
            worker_memory_gib and device.
        subquantizers: Instead of faiss_factory: 4 sqrt(N) inverted lists with product-quantized
            codes of so many bytes.
        metric: inner_product or l2. Vectors have unit length, so both find the same neighbors; l2
            is what other readers of the index file may expect.
        train_index_size: Vectors sampled to train the index.
        nprobe: Inverted lists a query visits; by default the fewest (a power of two) that reach
            target_recall.
        target_recall: recall@recall_k that nprobe is chosen for; by default 0.98.
        seed: Of the training sample and of the recall sample.
        total_shards: Shards that are embedded or added independently, then merged.
        shard_id: With stage embed or add: only this shard, as one of several independent jobs.
        worker_memory_gib: Memory of one worker. An index that does not fit stays in shards, which
            are searched one by one.
        device: Where the exact search that recall is measured against runs: cpu or a CUDA device.
        recall_sample: Queries of the recall measurement.
        recall_k: Neighbors of the recall measurement.
        cluster: Where tasks run.
        dry_run: Check the inputs, print the plan with sizes and seconds, and write nothing.
    """

    stage: Literal["embed", "train", "add", "merge", "tune", "all", "status"]
    dataset_url: str
    output_url: str
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    block_chunks: int = 8192
    percent: float = 1.0
    faiss_factory: str | None = None
    subquantizers: int | None = None
    metric: Literal["inner_product", "l2"] = "inner_product"
    train_index_size: int = 200_000
    nprobe: int | None = None
    target_recall: float | None = None
    seed: int = 0
    total_shards: int = 1
    shard_id: int | None = None
    worker_memory_gib: float = 8.0
    device: str = "cpu"
    recall_sample: int = 1000
    recall_k: int = 10
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    dry_run: bool = False


def run(config: BuildIndexConfig) -> dict[str, Any]:
    _check(config)
    dataset = Dataset(config.dataset_url)
    if dataset.manifest.split != "retrieval":
        raise ValueError(
            f"{config.dataset_url} is the {dataset.manifest.split} dataset; only a retrieval "
            "dataset is indexed"
        )
    if config.stage == "status":
        return {"folders": read_status(config.output_url, dataset.manifest.fingerprint)}
    if config.dry_run:
        return _describe(config, dataset)
    cluster = cluster_of(config.cluster, config.stage in ("all", *_SHARDED), config.shard_id)
    with open_runner(cluster, join_url(config.output_url, "reports")) as runner:
        facts = runner.call(embedder_facts, config.embedder)
        embed_task, task = _tasks(config, dataset, facts)
        result: dict[str, Any] = {}
        for stage in STAGES if config.stage == "all" else (config.stage,):
            result = _run_stage(stage, runner, config, dataset, embed_task, task)
    return {
        "embeddings_url": embed_task.folder.url,
        "index_url": task.folder.url,
        **_summary(result),
    }


def _check(config: BuildIndexConfig) -> None:
    if config.shard_id is not None and config.stage not in _SHARDED:
        raise ValueError(
            f"shard_id names one shard for stages embed and add; it has no effect on stage "
            f"{config.stage}"
        )
    for one, other in (("subquantizers", "faiss_factory"), ("target_recall", "nprobe")):
        if getattr(config, one) is not None and getattr(config, other) is not None:
            raise ValueError(f"{one} chooses {other}, which is given too; leave one of them out")
    if not 0 < config.percent <= 1:
        raise ValueError(f"percent is {config.percent}; expected above 0 and at most 1")
    if config.target_recall is not None and not 0 < config.target_recall <= 1:
        raise ValueError(f"target_recall is {config.target_recall}; expected above 0, at most 1")


def cluster_of(cluster: ClusterConfig, is_parallel: bool, shard_id: int | None) -> ClusterConfig:
    """Stages of one task need no cluster of their own: they run in this process."""
    alone = not is_parallel or shard_id is not None
    if alone and cluster.scheduler_address is None and cluster.kind == "local":
        return replace(cluster, kind="none")
    return cluster


def plan_embedding(
    dataset: Dataset,
    embedder: EmbedderConfig,
    facts: dict[str, Any],
    block_chunks: int,
    output_url: str,
    **reuse: str,
) -> EmbedTask:
    """The task of embedding a dataset; its folder is named by all that determines the vectors."""
    details = {"dataset_fingerprint": dataset.manifest.fingerprint, **facts}
    key = content_key(
        details["dataset_fingerprint"], facts["embedder_fingerprint"], block_chunks, bool(reuse)
    )[:16]
    folder = StageFolder(join_url(output_url, f"embeddings-{key}"))
    return EmbedTask(folder, dataset.url, embedder, block_chunks, details, **reuse)


def embed_dataset(runner: Runner, task: EmbedTask, num_chunks: int) -> dict[str, Any]:
    """Runs the embed stage and publishes its manifest."""
    embed_blocks(runner, task, num_chunks, range(num_blocks(num_chunks, task.block_chunks)))
    return commit_embeddings(task, num_chunks)


def embed_blocks(runner: Runner, task: EmbedTask, num_chunks: int, blocks: range) -> None:
    """Embeds some blocks of a dataset."""
    every = num_blocks(num_chunks, task.block_chunks)
    stages = {"embed": ("blocks/*", every), "commit": ("embeddings", 1)}
    announce(task.folder, "embeddings", task.details["dataset_fingerprint"], stages)
    runner.run(embed_block, task, blocks, "embed")


def _tasks(
    config: BuildIndexConfig, dataset: Dataset, facts: dict[str, Any]
) -> tuple[EmbedTask, index_build.IndexTask]:
    embed_task = plan_embedding(
        dataset, config.embedder, facts, config.block_chunks, config.output_url
    )
    return embed_task, _index_task(config, dataset, embed_task)


def _indexed_chunks(dataset: Dataset, percent: float) -> int:
    if percent == 1:
        return dataset.num_chunks
    documents = max(1, int(dataset.num_documents * percent))
    return int(dataset.document_first_chunk[documents])


def _choice(config: BuildIndexConfig, num_vectors: int, dimension: int) -> IndexChoice:
    factory = config.faiss_factory
    if config.subquantizers is not None:
        # np: half a minute less for an order of the codes that no search here uses.
        factory = f"IVF{default_lists(num_vectors)},PQ{config.subquantizers}np"
    memory = int(config.worker_memory_gib * 2**30)
    choice = choose_index(num_vectors, dimension, memory, config.device, factory)
    if config.total_shards < choice.least_shards:
        raise ValueError(
            f"total_shards is {config.total_shards}, but {choice.reasons[-1]}; expected "
            f"total_shards of at least {choice.least_shards}, or more worker_memory_gib"
        )
    return choice


def _index_task(
    config: BuildIndexConfig, dataset: Dataset, embed_task: EmbedTask
) -> index_build.IndexTask:
    indexed = _indexed_chunks(dataset, config.percent)
    choice = _choice(config, indexed, embed_task.details["dimension"])
    names = ("metric", "train_index_size", "seed", "nprobe", "target_recall")
    options = {name: getattr(config, name) for name in (*names, "recall_sample", "recall_k")}
    parts = None if choice.merge_shards else config.total_shards
    key = content_key(
        embed_task.details, choice.factory, indexed, options, parts, config.block_chunks
    )[:16]
    return index_build.IndexTask(
        folder=StageFolder(join_url(config.output_url, f"index-{key}")),
        embeddings_url=embed_task.folder.url,
        factory=choice.factory,
        merge_shards=choice.merge_shards,
        indexed_chunks=indexed,
        total_shards=config.total_shards,
        device=config.device,
        details=embed_task.details,
        **options,
    )


def _run_stage(
    stage: str,
    runner: Runner,
    config: BuildIndexConfig,
    dataset: Dataset,
    embed_task: EmbedTask,
    task: index_build.IndexTask,
) -> dict[str, Any]:
    if stage == "embed":
        return _embed(runner, config, dataset, embed_task)
    fingerprint = dataset.manifest.fingerprint
    announce(task.folder, "index", fingerprint, task.stages)
    if stage == "add":
        shards = range(config.total_shards) if config.shard_id is None else [config.shard_id]
        runner.run(index_build.add, task, shards, "add")
        return {}
    if stage == "train":
        commit_embeddings(embed_task, dataset.num_chunks)
    functions = {"train": index_build.train, "merge": index_build.merge, "tune": index_build.tune}
    return runner.run(functions[stage], task, [0], stage)[0]


def _embed(
    runner: Runner, config: BuildIndexConfig, dataset: Dataset, task: EmbedTask
) -> dict[str, Any]:
    """All blocks, or those of one shard."""
    if config.shard_id is None:
        return embed_dataset(runner, task, dataset.num_chunks)
    every = num_blocks(dataset.num_chunks, config.block_chunks)
    blocks = range(*shard_range(every, config.total_shards, config.shard_id))
    embed_blocks(runner, task, dataset.num_chunks, blocks)
    return {}


def _summary(manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        key: manifest[key] for key in ("vectors", "factory", "nprobe", "recall") if key in manifest
    }


def _describe(config: BuildIndexConfig, dataset: Dataset) -> dict[str, Any]:
    from indexing.cost_estimate import estimate_index

    facts = embedder_facts(config.embedder)
    embed_task, task = _tasks(config, dataset, facts)
    choice = _choice(config, task.indexed_chunks, facts["dimension"])
    for reason in choice.reasons:
        log.info("%s", reason)
    return {
        "embeddings_url": embed_task.folder.url,
        "index_url": task.folder.url,
        "chunks": dataset.num_chunks,
        "indexed_chunks": task.indexed_chunks,
        "dimension": facts["dimension"],
        "embedding_bytes": dataset.num_chunks * facts["dimension"] * 2,
        "embedding_tasks": num_blocks(dataset.num_chunks, config.block_chunks),
        "factory": choice.factory,
        "index_bytes": choice.index_bytes,
        "merge_shards": choice.merge_shards,
        "reasons": list(choice.reasons),
        "core_seconds": estimate_index(dataset, config.embedder, task),
    }


if __name__ == "__main__":
    run_job(
        "Embed a retrieval dataset and build its Faiss index on Dask workers.",
        BuildIndexConfig,
        run,
    )
