"""Preparation with Spark: loose JSON -> tokenized, padded, chunked retmmap datasets.

Two passes over byte-range splits of the input, both `mapInArrow`: (1) content hashes, from which
Spark finds exact duplicates; (2) tokenize and write. A task reads and writes through fsspec by
itself; token ids never cross the JVM. The driver turns the tasks' records into manifests.

Spark file. `etl/split_writer.py` does a task's work and knows nothing of Spark.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
from pyspark.errors import PythonException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf

from etl import manifest as manifests
from etl.loose_json import BadRecordError, InputError, SourceFile, find_sources, plan_splits
from etl.manifest import DatasetManifest, Shard, Split, shard_from_json
from etl.retmmap import Layout, dtype_for_vocabulary
from etl.split_writer import SPLITS, SplitTask, parse_weights
from etl.storage import StageFolder, content_key, create_json, join_url, scratch_folder
from etl.tokenizer import EOD_TOKEN, ByteLevelTokenizer, load_tokenizer

log = logging.getLogger(__name__)
_CORPUS = "corpus"


@dataclass(frozen=True)
class PrepareConfig:
    """What to read, how to cut it, where to put it.

    Attributes:
        input_urls: Loose JSON file (.jsonl, .json, also .gz and .zst), folder or glob on any fsspec
            URL, or a list of them.
        output_url: Folder for the datasets; each configuration and input gets a folder of its own
            inside.
        tokenizer_url: A tokenizer.json, or a folder with it or with GPT-2's vocab.json and
            merges.txt.
        text_key: Field of a record that holds the text (NeMo's --json-keys).
        split_key: Field that names a record's split: train, validation, test, or retrieval (in the
            retrieval dataset only). Records without it are assigned by the hash of their text.
        splits_string: Weights of train, validation, test and optionally retrieval for the
            assignment by hash.
        split_seed: Another seed is another assignment by hash.
        chunk_size: Tokens of a chunk; documents are padded to a multiple of it.
        stride: Distance of chunk starts in the retrieval dataset; divides chunk_size, which is the
            default.
        append_eod: End every document with the end-of-document token.
        eod_token: That token's string in the tokenizer.
        nemo_padding: Always add at least one pad to a document, as NeMo does, byte for byte.
        retrieval_db: Write the retrieval dataset: documents of train and of retrieval, never
            held-out ones.
        duplicates: What happens to a document whose text occurred before (exactly): drop or keep
            it.
        on_bad_record: skip a record that cannot be used (counted and listed), or fail on the first.
        split_bytes: Input bytes of one Spark task and one shard; 32 to 128 MB for large inputs.
        dry_run: Check the inputs, print the plan and write nothing.
    """

    input_urls: str | list[str]
    output_url: str
    tokenizer_url: str
    text_key: str = "text"
    split_key: str | None = None
    splits_string: str = "98,1,1"
    split_seed: int = 0
    chunk_size: int = 64
    stride: int | None = None
    append_eod: bool = True
    eod_token: str = EOD_TOKEN
    nemo_padding: bool = False
    retrieval_db: bool = True
    duplicates: Literal["drop", "keep"] = "drop"
    on_bad_record: Literal["skip", "fail"] = "skip"
    split_bytes: int = 64 << 20
    dry_run: bool = False


@dataclass(frozen=True)
class _Plan:
    """The checked inputs of a run: everything that determines the output, and where that goes."""

    config: PrepareConfig
    sources: list[SourceFile]
    tokenizer: ByteLevelTokenizer
    task: SplitTask
    folder: StageFolder
    num_splits: int


def prepare(config: PrepareConfig, session: Callable[[], SparkSession]) -> dict[str, Any]:
    """Runs or continues the preparation; returns the urls and counts of the datasets.

    `session` is called only if there is work left for Spark.

    Raises:
        FileNotFoundError, InputError, TokenizerError, RetMMapError: inputs or options that cannot
            work.
        BadRecordError: a bad record, with on_bad_record = fail.
    """
    plan = _plan(config)
    if config.dry_run:
        return _describe(plan)
    finished = plan.folder.record(_CORPUS)
    if finished is None:
        missing = [
            i
            for i in range(plan.num_splits)
            if plan.folder.record(plan.task.record_name(i)) is None
        ]
        log.info("%d of %d splits to prepare in %s", len(missing), plan.num_splits, plan.folder.url)
        if missing:
            spark = session()
            try:
                _run_tasks(plan, missing, spark)
            except PythonException as error:
                if ours := _input_error(error):
                    raise ours from error
                raise
        finished = _commit(plan)
    _warn_of_rejects(plan, finished)
    datasets = {
        split: {"url": plan.folder.path_of(split), **entry}
        for split, entry in finished["datasets"].items()
    }
    kept = {k: v for k, v in finished.items() if k != "files"}
    return {"url": plan.folder.url, **kept, "datasets": datasets}


def _plan(config: PrepareConfig) -> _Plan:
    sources = find_sources(
        [config.input_urls] if isinstance(config.input_urls, str) else config.input_urls
    )
    tokenizer = load_tokenizer(config.tokenizer_url, config.eod_token)
    dtype = dtype_for_vocabulary(tokenizer.vocab_size)
    training = Layout.of(config.chunk_size, dtype)
    retrieval = Layout.of(config.chunk_size, dtype, retrieval_db=True, stride=config.stride)
    if config.stride is not None and not config.retrieval_db:
        raise InputError(
            "stride acts on the retrieval dataset, but retrieval_db is false; leave one of them out"
        )
    weights = parse_weights(config.splits_string)
    if weights["retrieval"] and not config.retrieval_db:
        raise InputError("splits_string gives weight to retrieval, but retrieval_db is false")
    splits = plan_splits(sources, config.split_bytes)
    determining = {**asdict(config), "tokenizer_url": tokenizer.fingerprint}
    for name in ("input_urls", "output_url", "dry_run", "on_bad_record"):
        del determining[name]
    inputs = [(source.name, source.bytes, source.version) for source in sources]
    folder = StageFolder(join_url(config.output_url, content_key(determining, inputs)[:16]))
    task = SplitTask(
        folder=folder,
        sources=tuple(sources),
        splits=tuple(map(tuple, splits)),
        tokenizer_json=tokenizer.to_json(),
        eod_token=config.eod_token,
        text_key=config.text_key,
        split_key=config.split_key,
        weights=weights,
        split_seed=config.split_seed,
        training=training,
        retrieval=retrieval if config.retrieval_db else None,
        append_eod=config.append_eod,
        nemo_padding=config.nemo_padding,
        fail_on_bad_record=config.on_bad_record == "fail",
    )
    return _Plan(config, sources, tokenizer, task, folder, len(splits))


def _describe(plan: _Plan) -> dict[str, Any]:
    return {
        "url": plan.folder.url,
        "files": len(plan.sources),
        "input_bytes": sum(source.bytes for source in plan.sources),
        "tasks": plan.num_splits,
        "vocab_size": plan.tokenizer.vocab_size,
        "dtype": plan.task.training.dtype.name,
    }


def _run_tasks(plan: _Plan, missing: list[int], spark: SparkSession) -> None:
    context = spark.sparkContext
    context.setJobDescription("prepare: find exact duplicates")
    indices = [(i,) for i in missing]
    work = spark.createDataFrame(context.parallelize(indices, len(indices)), "index int")
    if plan.config.duplicates == "drop":
        work = work.join(_dropped_ordinals(plan, spark), "index", "left")
    else:
        work = work.withColumn("dropped", sf.lit(None).cast("array<int>"))
    work = work.repartitionByRange(len(missing), "index")
    context.setJobDescription("prepare: tokenize and write")
    task = plan.task

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for row in batch.to_pylist():
                error = task.write(row["index"], frozenset(row["dropped"] or ()))
                yield pa.RecordBatch.from_pylist([{"index": row["index"], "error": error}], _RESULT)

    results = work.mapInArrow(write, "index int, error string").collect()
    errors = sorted((row["index"], row["error"]) for row in results if row["error"])
    if errors:
        raise BadRecordError(f"{errors[0][1]}. Mend it, or run with --on_bad_record=skip")


def _input_error(error: PythonException) -> InputError | None:
    """The message of one of our own errors that a task raised; Spark wraps it in its traceback."""
    found = re.search(r"^etl\.\w+\.\w+Error: (.+)$", str(error), re.MULTILINE)
    return InputError(found[1]) if found else None


_RESULT = pa.schema([("index", pa.int32()), ("error", pa.string())])
_HASHES = pa.schema(
    [("high", pa.int64()), ("low", pa.int64()), ("index", pa.int32()), ("ordinal", pa.int32())]
)


def _dropped_ordinals(plan: _Plan, spark: SparkSession) -> DataFrame:
    """(index, dropped): for each split, the numbers of its documents whose text stands earlier in
    the input.
    """
    task = plan.task
    every = [(i,) for i in range(plan.num_splits)]

    def hash_split(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for row in batch.to_pylist():
                for hashes in task.content_hashes(row["index"]):
                    index = [row["index"]] * len(hashes)
                    columns = [
                        hashes["high"],
                        hashes["low"],
                        pa.array(index, pa.int32()),
                        hashes["ordinal"],
                    ]
                    yield pa.RecordBatch.from_arrays([pa.array(c) for c in columns], schema=_HASHES)

    splits = spark.createDataFrame(spark.sparkContext.parallelize(every, len(every)), "index int")
    hashes = splits.mapInArrow(hash_split, "high long, low long, index int, ordinal int")
    place = sf.struct("index", "ordinal")
    first = hashes.groupBy("high", "low").agg(
        sf.min(place).alias("first"), sf.count("*").alias("count")
    )
    later = hashes.join(first.where("count > 1"), ["high", "low"]).where(place != sf.col("first"))
    return later.groupBy("index").agg(sf.collect_list("ordinal").alias("dropped"))


def _commit(plan: _Plan) -> dict[str, Any]:
    """Manifests from the records of all splits, then the corpus record: from here on the datasets
    exist.
    """
    records = [plan.folder.record(plan.task.record_name(i)) for i in range(plan.num_splits)]
    if any(record is None for record in records):
        raise RuntimeError(
            f"{records.count(None)} splits have no record after the Spark job; run the job again"
        )
    complete = [record for record in records if record is not None]
    datasets: dict[str, Any] = {}
    for split in SPLITS:
        shards = [
            shard_from_json(record["shards"][split])
            for record in complete
            if split in record["shards"]
        ]
        if shards:
            datasets[split] = _write_manifest(plan, split, tuple(shards))
    counts = sum((Counter(record["counts"]) for record in complete), Counter[str]())
    rejects = sum((Counter(record["reject_reasons"]) for record in complete), Counter[str]())
    value = {
        "datasets": datasets,
        "sources": [source.name for source in plan.sources],
        "counts": {
            name: counts[name]
            for name in ("documents", "text_bytes", "duplicates_dropped", "held_out")
        },
        "skipped": dict(sorted(rejects.items())),
    }
    plan.folder.remove_scratch()
    return plan.folder.publish(_CORPUS, value)


def _write_manifest(plan: _Plan, split: Split, shards: tuple[Shard, ...]) -> dict[str, Any]:
    folder = StageFolder(plan.folder.path_of(split))
    with scratch_folder(folder.url) as scratch:
        path = scratch / "tokenizer.json"
        path.write_text(plan.task.tokenizer_json)
        [tokenizer_file] = folder.store("tokenizer", path)
    layout = plan.task.layout_of(split)
    manifest = DatasetManifest(
        split=split,
        chunk_size=layout.chunk_size,
        stride=layout.stride,
        dtype_code=layout.dtype_code,
        pad_id=plan.tokenizer.pad_id,
        eod_id=plan.tokenizer.eod_id,
        eod_token=plan.tokenizer.eod_token,
        vocab_size=plan.tokenizer.vocab_size,
        tokenizer=tokenizer_file,
        tokenizer_fingerprint=plan.tokenizer.fingerprint,
        sources=tuple(source.name for source in plan.sources),
        shards=shards,
    )
    create_json(folder.path_of(manifests.NAME), manifest.to_json())
    return {
        "fingerprint": manifest.fingerprint,
        "shards": len(shards),
        "documents": manifest.num_documents,
        "chunks": manifest.num_chunks,
        "tokens": manifest.num_tokens,
        "text_bytes": manifest.text_bytes,
    }


def _warn_of_rejects(plan: _Plan, finished: dict[str, Any]) -> None:
    for reason, count in finished["skipped"].items():
        log.warning("skipped %d records: %s", count, reason)
    if finished["skipped"]:
        log.warning("file, byte offset and reason of each: %s", plan.folder.path_of("rejects"))
