"""What a join is to do: its configuration, checked against the datasets and the map. No engine."""

from dataclasses import dataclass
from typing import Any

from etl.dataset import Dataset, check_no_leak
from etl.storage import StageFolder, StorageError, content_key, join_url
from indexing.join_choice import MapRows
from indexing.join_shards import JoinTask
from indexing.joined import Compression, JoinedError, JoinedLayout, encode_block
from indexing.joined_manifest import FORMAT, VERSION
from indexing.knn_manifest import BuiltMap, open_map

_ARROW_ROWS = 100_000
_ROW_BYTES = 32
"""Spark's rows cost 8 bytes and 8 a field besides what is in them."""


@dataclass(frozen=True)
class JoinConfig:
    """Joins the samples of a dataset with their neighbors' tokens.

    Attributes:
        dataset_url: Folder of the dataset that samples are made of.
        map_url: Folder of its KNN map, as jobs.build_knn_map prints it.
        retrieval_url: Folder of the retrieval dataset of the map.
        output_url: Folder for joined datasets; each configuration gets a folder of its own inside.
        seq_length: Tokens of a sample.
        K_keep: Neighbors kept of each chunk: trainers can use as many or fewer.
        samples_per_block: Samples that a reader gets and checks at a time.
        blocks_per_shard: Blocks of one file.
        compression: Of each block.
        compression_level: Of zstd.
        num_partitions: Tasks of each step; no influence on the output.
        dry_run: Check the inputs, print the plan with sizes, and write nothing.
    """

    dataset_url: str
    map_url: str
    retrieval_url: str
    output_url: str
    seq_length: int = 2048
    K_keep: int = 2
    samples_per_block: int = 16
    blocks_per_shard: int = 256
    compression: Compression = "none"
    compression_level: int = 3
    num_partitions: int = 64
    dry_run: bool = False


def plan_join(config: JoinConfig) -> JoinTask:
    """The task, in a folder whose name has a hash of everything that determines its content.

    Raises:
        FileNotFoundError: a dataset or a map is not there.
        StorageError: they do not belong together, or held-out documents are in the retrieval
            dataset.
        JoinedError: sizes that cannot be, or more neighbors than the map holds.
    """
    training, retrieval = Dataset(config.dataset_url), Dataset(config.retrieval_url)
    built_map = open_map(config.map_url)
    _check_parents(training, retrieval, built_map)
    rows = MapRows(built_map)
    if (rows.chunk_start, rows.rows) != (0, training.num_chunks):
        raise StorageError(
            f"{built_map.url} holds {rows.rows} chunks from {rows.chunk_start}; {training.url} has "
            f"{training.num_chunks}: build the map for all of them"
        )
    if config.K_keep > rows.k:
        raise JoinedError(f"K_keep is {config.K_keep}; {built_map.url} holds {rows.k} a chunk")
    if config.num_partitions < 1:
        raise JoinedError(f"num_partitions is {config.num_partitions}; expected at least 1")
    layout = _layout(config, training)
    num_tokens = training.num_chunks * training.chunk_size
    parents = _parents(training, retrieval, built_map)
    key = content_key(FORMAT, VERSION, layout, parents)[:16]
    return JoinTask(
        folder=StageFolder(join_url(config.output_url, f"joined-{key}")),
        dataset_url=training.url,
        retrieval_url=retrieval.url,
        map=built_map,
        layout=layout,
        num_samples=max(1, -(-(num_tokens - 1) // config.seq_length)),
        parents=parents,
    )


def _layout(config: JoinConfig, training: Dataset) -> JoinedLayout:
    return JoinedLayout(
        seq_length=config.seq_length,
        chunk_size=training.chunk_size,
        neighbors=config.K_keep,
        dtype_code=training.manifest.dtype_code,
        samples_per_block=config.samples_per_block,
        blocks_per_shard=config.blocks_per_shard,
        compression=config.compression,
        level=config.compression_level,
    )


def _parents(training: Dataset, retrieval: Dataset, built_map: BuiltMap) -> dict[str, Any]:
    manifest = training.manifest
    return {
        "split": manifest.split,
        "training_fingerprint": manifest.fingerprint,
        "retrieval_fingerprint": retrieval.manifest.fingerprint,
        "map_fingerprint": built_map.fingerprint,
        "index_fingerprint": built_map.manifest.get("index_fingerprint"),
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        "pad_id": manifest.pad_id,
        "eod_id": manifest.eod_id,
        "vocab_size": manifest.vocab_size,
    }


def _check_parents(training: Dataset, retrieval: Dataset, built_map: BuiltMap) -> None:
    built_map.check_parents(training, retrieval)
    if training.manifest.split == "retrieval" or retrieval.manifest.split != "retrieval":
        raise StorageError(
            f"{training.url} is the {training.manifest.split} dataset, {retrieval.url} the "
            f"{retrieval.manifest.split} dataset; expected one to train on and a retrieval dataset"
        )
    if not training.num_chunks:
        raise StorageError(f"{training.url} is empty")
    for name in ("tokenizer_fingerprint", "chunk_size", "dtype_code", "pad_id"):
        ours, theirs = getattr(training.manifest, name), getattr(retrieval.manifest, name)
        if ours != theirs:
            raise StorageError(
                f"{name} is {ours} in {training.url} and {theirs} in {retrieval.url}; expected the "
                "same: prepare both together"
            )
    check_no_leak(training, retrieval)


def describe_join(task: JoinTask, num_partitions: int) -> dict[str, Any]:
    """Sizes before compression, at most: a missing neighbor is not asked for.

    stored_bytes: after compression, by what it gains on the block in the middle.
    documents_bytes: tables of the retrieval documents' keys, mapped by every task of the requests.
    memory_bytes: what the arrays of a task of the last step hold, without Spark itself.
    """
    layout, whole = task.layout, task.num_samples // task.layout.samples_per_block
    block = layout.block_bytes(layout.samples_per_block)
    requests = task.num_samples * layout.chunks * layout.neighbors
    answers = requests * (_ROW_BYTES + task.payload_bytes)
    size = whole * block + layout.block_bytes(task.num_samples % layout.samples_per_block)
    share = 1.0
    if layout.compression != "none":
        example = task.example()
        share = len(encode_block(example, layout)) / layout.block_bytes(len(example.tokens))
    return {
        "joined_url": task.folder.url,
        "samples": task.num_samples,
        "shards": task.num_shards,
        "bytes": size,
        "stored_bytes": round(size * share),
        "requests": requests,
        "documents_bytes": 24 * Dataset(task.retrieval_url).num_documents,
        "shuffle_bytes": requests * (_ROW_BYTES + 8) + answers,
        "shuffle_bytes_a_partition": -(-answers // num_partitions),
        "memory_bytes": 3 * block + 3 * _ARROW_ROWS * task.payload_bytes,
    }
