"""index | `python -m jobs.build_index {embed,train,add,merge,all}` | Dask |
reads a retrieval dataset | writes embeddings, a trained index, index shards, the final Faiss index.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from etl.dataset import Dataset
from etl.storage import StageFolder, content_key, join_url
from indexing import index_build
from indexing.cluster import ClusterConfig, dask_client, run_tasks
from indexing.embedder import EmbedderConfig, embedder_facts
from indexing.embeddings import EmbedTask, commit_embeddings, embed_block, num_blocks
from indexing.faiss_index import choose_factory
from jobs.command_line import run_job

STAGES = ("embed", "train", "add", "merge")


@dataclass(frozen=True)
class BuildIndexConfig:
    """From a retrieval dataset to a Faiss index with known recall.

    Attributes:
        stage: One stage, or all of them in order. A stage that is finished does nothing.
        dataset_url: Folder of the retrieval dataset.
        output_url: Folder for embeddings and indexes; each configuration gets a folder of its own
            inside.
        embedder: The sentence-embedding model.
        block_chunks: Chunks of one embedding task and file.
        faiss_factory: Faiss factory string; by default exact search up to 200,000 vectors and IVF
            with 8-bit codes above.
        train_index_size: Vectors sampled to train the index.
        nprobe: Inverted lists a query visits, recorded as the index's default; only for an index
            that has them.
        seed: Of the training sample and of the recall sample.
        total_shards: Index shards that are added independently and then merged.
        shard_id: With stage add: only this shard, as one of several independent jobs.
        recall_sample: Queries of the recall measurement.
        recall_k: Neighbors of the recall measurement.
        cluster: The Dask cluster.
        dry_run: Check the inputs, print the plan with sizes and write nothing.
    """

    stage: Literal["embed", "train", "add", "merge", "all"]
    dataset_url: str
    output_url: str
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    block_chunks: int = 8192
    faiss_factory: str | None = None
    train_index_size: int = 200_000
    nprobe: int | None = None
    seed: int = 0
    total_shards: int = 1
    shard_id: int | None = None
    recall_sample: int = 1000
    recall_k: int = 10
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    dry_run: bool = False


def run(config: BuildIndexConfig) -> dict[str, Any]:
    if config.shard_id is not None and config.stage != "add":
        raise ValueError(
            f"shard_id names one shard for stage add; it has no effect on stage {config.stage}"
        )
    dataset = Dataset(config.dataset_url)
    if dataset.manifest.split != "retrieval":
        raise ValueError(
            f"{config.dataset_url} is the {dataset.manifest.split} dataset; only a retrieval "
            "dataset is indexed"
        )
    if config.dry_run:
        return _describe(config, dataset, embedder_facts(config.embedder))
    with dask_client(config.cluster) as client:
        facts = client.submit(embedder_facts, config.embedder, pure=False).result()
        embed_task, task = _tasks(config, dataset, facts)
        result: dict[str, Any] = {}
        for stage in STAGES if config.stage == "all" else (config.stage,):
            result = _run_stage(stage, client, config, dataset, embed_task, task)
    return {
        "embeddings_url": embed_task.folder.url,
        "index_url": task.folder.url,
        **_summary(result),
    }


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


def embed_dataset(client: Any, task: EmbedTask, num_chunks: int) -> dict[str, Any]:
    """Runs the embed stage on the cluster and publishes its manifest."""
    run_tasks(client, embed_block, task, range(num_blocks(num_chunks, task.block_chunks)), "embed")
    return commit_embeddings(task, num_chunks)


def _tasks(
    config: BuildIndexConfig, dataset: Dataset, facts: dict[str, Any]
) -> tuple[EmbedTask, index_build.IndexTask]:
    embed_task = plan_embedding(
        dataset, config.embedder, facts, config.block_chunks, config.output_url
    )
    return embed_task, _index_task(config, dataset, embed_task)


def _index_task(
    config: BuildIndexConfig, dataset: Dataset, embed_task: EmbedTask
) -> index_build.IndexTask:
    factory = config.faiss_factory or choose_factory(dataset.num_chunks)[0]
    determining = (embed_task.details, factory, config.train_index_size, config.seed, config.nprobe)
    recall = (config.recall_sample, config.recall_k)
    key = content_key(determining, recall, config.block_chunks)[:16]
    return index_build.IndexTask(
        folder=StageFolder(join_url(config.output_url, f"index-{key}")),
        embeddings_url=embed_task.folder.url,
        factory=factory,
        train_index_size=config.train_index_size,
        seed=config.seed,
        nprobe=config.nprobe,
        total_shards=config.total_shards,
        recall_sample=config.recall_sample,
        recall_k=config.recall_k,
        details=embed_task.details,
    )


def _run_stage(
    stage: str,
    client: Any,
    config: BuildIndexConfig,
    dataset: Dataset,
    embed_task: EmbedTask,
    task: index_build.IndexTask,
) -> dict[str, Any]:
    if stage == "embed":
        return embed_dataset(client, embed_task, dataset.num_chunks)
    if stage == "add":
        shards = range(config.total_shards) if config.shard_id is None else [config.shard_id]
        run_tasks(client, index_build.add, task, shards, "add")
        return {}
    return run_tasks(
        client, index_build.train if stage == "train" else index_build.merge, task, [0], stage
    )[0]


def _summary(manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        key: manifest[key] for key in ("vectors", "factory", "nprobe", "recall") if key in manifest
    }


def _describe(config: BuildIndexConfig, dataset: Dataset, facts: dict[str, Any]) -> dict[str, Any]:
    embed_task, task = _tasks(config, dataset, facts)
    return {
        "embeddings_url": embed_task.folder.url,
        "index_url": task.folder.url,
        "chunks": dataset.num_chunks,
        "dimension": facts["dimension"],
        "embedding_bytes": dataset.num_chunks * facts["dimension"] * 2,
        "embedding_tasks": num_blocks(dataset.num_chunks, config.block_chunks),
        "factory": task.factory,
        "reason": "faiss_factory"
        if config.faiss_factory
        else choose_factory(dataset.num_chunks)[1],
    }


if __name__ == "__main__":
    run_job(
        "Embed a retrieval dataset and build its Faiss index on Dask workers.",
        BuildIndexConfig,
        run,
    )
