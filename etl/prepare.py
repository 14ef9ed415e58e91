"""Preparation with Spark: loose JSON -> tokenized, padded, chunked retmmap datasets.

Two passes over splits of the input, both `mapInArrow`: (1) hashes and signatures, from which Spark
finds duplicates (`etl/duplicates.py`); (2) tokenize and write. A task reads and writes through
fsspec by itself; token ids never cross the JVM. The driver turns the tasks' records into manifests.
What a pass has found is stored, so a run that is started again repeats neither.

Spark file. `etl/prepare_plan.py` checks the configuration and `etl/split_writer.py` does a task's
work; they know nothing of Spark.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
from pyspark.errors import PythonException
from pyspark.sql import DataFrame, SparkSession

from etl import manifest as manifests
from etl.deadline import RemoteError
from etl.duplicates import store_fates
from etl.manifest import DatasetManifest, Shard, Split, shard_from_json
from etl.prepare_plan import Plan, PrepareConfig, describe, make_plan
from etl.prepare_progress import SplitProgress
from etl.records import BadRecordError
from etl.sources import InputError
from etl.split_writer import SplitTask
from etl.splits import SPLITS, load_split_list
from etl.storage import (
    StageFolder,
    StoredFile,
    content_key,
    create_json,
    read_json,
    scratch_folder,
    write_json,
)

log = logging.getLogger(__name__)
_CORPUS, _FATES = "corpus", "fates"


def prepare(config: PrepareConfig, session: Callable[[], SparkSession]) -> dict[str, Any]:
    """Runs or continues the preparation; returns the urls and counts of the datasets, with several
    text keys `{"keys": {key: ...}}` of each.

    `session` is called only if there is work left for Spark.

    Raises:
        FileNotFoundError, InputError, TokenizerError, EncoderError, RetMMapError: inputs or options
            that cannot work.
        BadRecordError: a bad record, with on_bad_record = fail.
    """
    if isinstance(config.text_key, str):
        return _prepare_key(config, session)
    if not config.text_key or len(set(config.text_key)) < len(config.text_key):
        raise InputError(f"text_key is {config.text_key}; expected one or more different fields")
    each = {key: _prepare_key(replace(config, text_key=key), session) for key in config.text_key}
    return {"keys": each}


def _prepare_key(config: PrepareConfig, session: Callable[[], SparkSession]) -> dict[str, Any]:
    plan = make_plan(config)
    if config.dry_run:
        return describe(plan)
    finished = plan.folder.record(_CORPUS)
    if finished is None:
        names = [plan.task.record_name(i) for i in range(plan.num_splits)]
        done = plan.folder.records(names)
        missing = [i for i, name in enumerate(names) if name not in done]
        log.info("%d of %d splits to prepare in %s", len(missing), plan.num_splits, plan.folder.url)
        if missing:
            spark = session()
            try:
                _run_tasks(plan, missing, spark)
            except PythonException as error:
                if ours := _own_error(error):
                    raise ours from error
                raise
        finished = _commit(plan, names)
    _refuse_rejects(plan, finished["skipped"])
    _warn_of_rejects(plan, finished)
    datasets = {
        split: {"url": plan.folder.path_of(split), **entry}
        for split, entry in finished["datasets"].items()
    }
    return {"url": plan.folder.url, **finished, "datasets": datasets}


def _run_tasks(plan: Plan, missing: list[int], spark: SparkSession) -> None:
    context = spark.sparkContext
    fates = _find_fates(plan, spark) if _needs_fates(plan) else {}
    context.setJobDescription(f"prepare: tokenize and write {len(missing)} splits")
    positions = spark.range(0, len(missing), 1, len(missing))
    with SplitProgress(context, len(missing)) as progress:
        results = _write_splits(plan.task, positions, missing, fates, progress).collect()
    errors = sorted((row["index"], row["error"]) for row in results if row["error"])
    if errors:
        raise BadRecordError(f"{errors[0][1]}. Mend it, or run with --on_bad_record=skip")


def _find_fates(plan: Plan, spark: SparkSession) -> dict[int, StoredFile]:
    """The stored fates of the splits that have any; found once, whatever is killed later."""
    known = plan.folder.records([_FATES])
    if not known:
        found = store_fates(spark, plan.task, plan.rule, plan.num_splits)
        files = {str(index): asdict(file) for index, file in sorted(found.items())}
        known = {_FATES: plan.folder.publish(_FATES, {"files": files})}
    return {int(i): StoredFile(**file) for i, file in known[_FATES]["files"].items()}


def _needs_fates(plan: Plan) -> bool:
    """Equal texts go to equal splits by hash; only names can tear them apart."""
    config = plan.config
    has_names = bool(config.split_key or config.split_list_url) and config.retrieval_db
    return config.duplicates == "drop" or plan.rule.is_near or has_names


def _write_splits(
    task: SplitTask,
    positions: DataFrame,
    missing: list[int],
    fates: dict[int, StoredFile],
    progress: SplitProgress,
) -> DataFrame:
    """(index, error) of the missing splits, each written by the task of its position."""
    count = progress.counter()

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for position in batch.column("id").to_pylist():
                index = missing[position]
                error = task.run(index, fates.get(index), count)
                yield pa.RecordBatch.from_pylist([{"index": index, "error": error}], _RESULT)

    return positions.mapInArrow(write, "index int, error string")


_RESULT = pa.schema([("index", pa.int32()), ("error", pa.string())])


def _own_error(error: PythonException) -> InputError | RemoteError | None:
    """One of our own errors that a task raised, without the traceback Spark wraps it in."""
    found = re.search(r"^etl\.(\w+)\.\w+Error: (.+)$", str(error), re.MULTILINE)
    if found is None:
        return None
    return RemoteError(found[2]) if found[1] == "deadline" else InputError(found[2])


def _commit(plan: Plan, names: list[str]) -> dict[str, Any]:
    """Manifests from the records of all splits, then the corpus record: from here on the datasets
    exist.
    """
    found = plan.folder.records(names)
    if len(found) < len(names):
        raise RuntimeError(
            f"{len(names) - len(found)} splits have no record after the Spark job; run the job "
            "again"
        )
    records = [found[name] for name in names]
    counts = sum((Counter(record["counts"]) for record in records), Counter[str]())
    rejects = sum((Counter(record["reject_reasons"]) for record in records), Counter[str]())
    _refuse_rejects(plan, rejects)
    datasets: dict[str, Any] = {}
    for split in SPLITS:
        shards = [record["shards"][split] for record in records if split in record["shards"]]
        if shards:
            parts = tuple(map(shard_from_json, shards))
            datasets[split] = _write_manifest(plan, split, parts, counts["held_back"])
    value = {
        "datasets": datasets,
        "sources": [source.name for source in plan.sources],
        "counts": {
            name: counts[name]
            for name in (
                *("documents", "text_bytes", "tokens", "duplicates_dropped"),
                *("near_duplicates_dropped", "held_out", "held_back"),
            )
        },
        "skipped": dict(sorted(rejects.items())),
    }
    committed = plan.folder.publish(_CORPUS, value)
    removed = plan.folder.remove_unnamed(_named(plan, records, datasets))
    if removed:
        log.info("removed %d objects that are no part of the datasets", removed)
    return committed


def _named(plan: Plan, records: list[dict[str, Any]], datasets: dict[str, Any]) -> set[str]:
    """Names of everything in the folder that a record or a manifest refers to."""
    named = {f"{_CORPUS}.json"}
    named |= {f"{plan.task.record_name(i)}.json" for i in range(plan.num_splits)}
    named |= {file["name"] for record in records for file in record["files"].values()}
    for split, entry in datasets.items():
        named |= {f"{split}/{manifests.NAME}", f"{split}/{entry['tokenizer']}"}
    return named


def _split_rule(config: PrepareConfig) -> dict[str, Any]:
    names = ("split_key", "splits_string", "split_seed", "duplicates", "near_duplicates")
    near = {"near_duplicate_threshold": config.near_duplicate_threshold}
    listed = load_split_list(config.split_list_url) if config.split_list_url else None
    return {
        **{name: getattr(config, name) for name in names},
        **(near if config.near_duplicates != "keep" else {}),
        "split_list": listed and content_key(sorted(listed.items())),
    }


def _write_manifest(
    plan: Plan, split: Split, shards: tuple[Shard, ...], held_back: int
) -> dict[str, Any]:
    folder = StageFolder(plan.folder.path_of(split))
    with scratch_folder(folder.url) as scratch:
        is_json = plan.task.tokenizer_data.lstrip()[:1] == b"{"
        path = scratch / ("tokenizer.json" if is_json else "tokenizer.model")
        path.write_bytes(plan.task.tokenizer_data)
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
        encoder=plan.task.encoder and plan.task.encoder.facts,
        split_rule=_split_rule(plan.config),
        held_back=held_back,
        sources=tuple(source.name for source in plan.sources),
        shards=shards,
    )
    _publish_manifest(folder.path_of(manifests.NAME), manifest.to_json())
    return {
        "tokenizer": tokenizer_file.name,
        "fingerprint": manifest.fingerprint,
        "shards": len(shards),
        "documents": manifest.num_documents,
        "chunks": manifest.num_chunks,
        "tokens": manifest.num_tokens,
        "text_bytes": manifest.text_bytes,
    }


def _publish_manifest(url: str, value: dict[str, Any]) -> None:
    """Replaces what a run left that was killed before its commit, and whose shards were redone."""
    if not create_json(url, value) and read_json(url) != json.loads(json.dumps(value)):
        write_json(url, value)


def _refuse_rejects(plan: Plan, reasons: Mapping[str, int]) -> None:
    """Splits that an earlier run wrote with on_bad_record = skip do not pass for faultless."""
    if reasons and plan.config.on_bad_record == "fail":
        reason, count = next(iter(sorted(reasons.items())))
        raise BadRecordError(
            f"an earlier run skipped {sum(reasons.values())} records ({count}: {reason}), listed "
            f"in {plan.folder.path_of('rejects')}; mend them, or run with --on_bad_record=skip"
        )


def _warn_of_rejects(plan: Plan, finished: dict[str, Any]) -> None:
    for reason, count in finished["skipped"].items():
        log.warning("skipped %d records: %s", count, reason)
    if finished["skipped"]:
        log.warning("file, byte offset and reason of each: %s", plan.folder.path_of("rejects"))
