"""Finds documents that are equal, or nearly so, with Spark: what becomes of each is its Fate.

Tasks read their splits and return a row a document (hash of the text, named split, MinHash
signature); grouping, joining and connecting is Spark's work. Spark file.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as sf

from etl.components import connected_components, near_duplicate_edges
from etl.minhash import signatures
from etl.records import Document
from etl.split_writer import SplitTask
from etl.splits import SPLITS, DuplicateRule, Fate
from etl.storage import StoredFile

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 4096, 1 << 20
_DOCUMENTS = pa.schema(
    [
        ("node", pa.int64()),
        ("high", pa.int64()),
        ("low", pa.int64()),
        ("named", pa.int8()),
        ("signature", pa.binary()),
    ]
)
_STORED = pa.schema(
    [("index", pa.int32()), ("name", pa.string()), ("bytes", pa.int64()), ("sha256", pa.string())]
)
_HELD_OUT_CODES = [SPLITS.index("validation"), SPLITS.index("test")]


def store_fates(
    spark: SparkSession, task: SplitTask, rule: DuplicateRule, num_splits: int
) -> dict[int, StoredFile]:
    """Finds the fates of all documents that are not alone in their cluster and stores those of
    each split; the files by number of the split."""

    def store(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for row in batch.to_pylist():
                file = task.store_fates(row["index"], _fates_by_ordinal(row["fates"]))
                yield pa.RecordBatch.from_pylist([{"index": row["index"], **asdict(file)}], _STORED)

    schema = "index int, name string, bytes long, sha256 string"
    context = spark.sparkContext
    documents = _documents(spark, task, rule, num_splits)
    if rule.is_near:
        context.setJobDescription(f"prepare: read and hash {num_splits} splits")
        documents = documents.persist()
        documents.count()  # the inputs are read once, by a job of its own
        fates = _by_split(_near_fates(spark, documents, rule))
        context.setJobDescription("prepare: store what becomes of near-duplicates")
    else:
        context.setJobDescription(f"prepare: read and hash {num_splits} splits, find duplicates")
        fates = _by_split(_equal_fates(documents, rule))
    rows = fates.mapInArrow(store, schema).collect()
    documents.unpersist()
    return {row["index"]: StoredFile(row["name"], row["bytes"], row["sha256"]) for row in rows}


def _by_split(fates: DataFrame) -> DataFrame:
    """(index int, fates): for each split, its documents that are not alone in their cluster, in no
    particular order."""
    names = ("reason", "high", "low", "held", "open")
    ordinal = sf.col("node").bitwiseAND(0xFFFFFFFF).cast("int").alias("ordinal")
    return fates.groupBy(sf.shiftright("node", 32).cast("int").alias("index")).agg(
        sf.collect_list(sf.struct(ordinal, *names)).alias("fates")
    )


def _first() -> Column:
    """(is_other, node, named) of the document of a group that is kept if one is: the first in the
    input of those that are named as held out, else the first. A held-out text never gives way to a
    copy elsewhere."""
    return sf.min(sf.struct((~_is_held()).alias("is_other"), "node", "named"))


def _is_held() -> Column:
    return sf.col("named").isin(_HELD_OUT_CODES)


def _equal_fates(documents: DataFrame, rule: DuplicateRule) -> DataFrame:
    """(node, reason, high, low, held, open) of documents whose text occurs more than once."""
    same = Window.partitionBy("high", "low")
    rows = documents.select(
        *("node", "high", "low"),
        _first().over(same).alias("first"),
        sf.max(_is_held()).over(same).alias("held"),
        sf.max(sf.col("named") < 0).over(same).alias("open"),
        sf.count("*").over(same).alias("count"),
    ).where("count > 1")
    if rule.duplicates == "keep":
        return rows.withColumn("reason", sf.lit(None).cast("string"))
    reason = sf.when(sf.expr("node != first.node"), "duplicates_dropped")
    return rows.withColumn("reason", reason).withColumn("open", sf.expr("first.named < 0"))


def _documents(
    spark: SparkSession, task: SplitTask, rule: DuplicateRule, num_splits: int
) -> DataFrame:
    is_near = rule.is_near

    def describe(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for row in batch.to_pylist():
                yield from _describe_split(task, row["index"], is_near)

    splits = spark.range(0, num_splits, 1, num_splits).withColumnRenamed("id", "index")
    schema = "node long, high long, low long, named byte, signature binary"
    return splits.mapInArrow(describe, schema)


def _describe_split(task: SplitTask, index: int, is_near: bool) -> Iterator[pa.RecordBatch]:
    batch: list[tuple[int, Document]] = []
    characters = 0
    for ordinal, document in task.documents(index):
        batch.append((index << 32 | ordinal, document))
        characters += len(document.text)
        if characters > _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield _describe(task, batch, is_near)
            batch, characters = [], 0
    yield _describe(task, batch, is_near)


def _describe(task: SplitTask, batch: list[tuple[int, Document]], is_near: bool) -> pa.RecordBatch:
    hashes = np.frombuffer(b"".join(d.content_hash for _, d in batch), "<i8").reshape(-1, 2)
    named = [task.rule.named(document) for _, document in batch]
    sketches = (
        signatures([document.text for _, document in batch]) if is_near else [None] * len(batch)
    )
    columns = [
        [node for node, _ in batch],
        np.ascontiguousarray(hashes[:, 0]),
        np.ascontiguousarray(hashes[:, 1]),
        [-1 if split is None else SPLITS.index(split) for split in named],
        [None if sketch is None else sketch.tobytes() for sketch in sketches],
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, _DOCUMENTS, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=_DOCUMENTS)


def _near_fates(spark: SparkSession, documents: DataFrame, rule: DuplicateRule) -> DataFrame:
    """(node, reason, high, low, held, open) of documents that are not alone in their cluster; high
    and low are the hash of the cluster's first document."""
    own = documents.select("node", "high", "low", "named")
    members = _near_clusters(spark, documents, rule.threshold).join(own, "node")
    kept_one = members.groupBy("cluster").agg(_first().getField("node").alias("kept"))
    members = members.join(kept_one, "cluster").withColumn("reason", _reason(rule))
    is_kept = sf.col("reason").isNull()
    flags = members.groupBy("cluster").agg(
        sf.max(is_kept & _is_held()).alias("held"),
        sf.max(is_kept & (sf.col("named") < 0)).alias("open"),
    )
    heads = own.selectExpr("node as cluster", "high", "low")
    return members.drop("high", "low").join(flags, "cluster").join(heads, "cluster")


def _near_clusters(spark: SparkSession, documents: DataFrame, threshold: float) -> DataFrame:
    """(node, first, cluster) of all documents that are not alone; first is the one that is kept of
    those with the same text, cluster the first of all."""
    spark.sparkContext.setJobDescription("prepare: find near-duplicates")
    groups = documents.groupBy("high", "low").agg(
        _first().getField("node").alias("first"), sf.count("*").alias("count")
    )
    equal = documents.join(groups.where("count > 1"), ["high", "low"]).select("node", "first")
    copies = equal.where("node != first")
    distinct = documents.join(copies, "node", "left_anti").select("node", "signature")
    near = near_duplicate_edges(distinct, threshold)
    same = copies.selectExpr("first as u", "node as v")
    components = connected_components(near.unionByName(same))
    clusters = components.withColumnRenamed("component", "cluster")
    return clusters.join(equal, "node", "left").select(
        "node", sf.coalesce("first", "node").alias("first"), "cluster"
    )


def _reason(rule: DuplicateRule) -> Column:
    """Why a document of a cluster is dropped; null if it is kept."""
    is_copy = (sf.col("node") != sf.col("first")) & sf.lit(rule.duplicates == "drop")
    is_near = (sf.col("node") != sf.col("kept")) & sf.lit(rule.near_duplicates == "drop")
    near_reason = sf.when(is_near, "near_duplicates_dropped")
    return sf.when(is_copy, "duplicates_dropped").otherwise(near_reason)


def _fates_by_ordinal(rows: list[dict[str, Any]]) -> dict[int, Fate]:
    return {
        row["ordinal"]: Fate(
            row["reason"],
            np.asarray([row["high"], row["low"]], "<i8").tobytes(),
            row["held"],
            row["open"],
        )
        for row in rows
    }
