"""Near-duplicate documents and the clusters they form, by Spark joins. Spark file.

Nothing but counts comes to the driver: candidate pairs, their check and the connected components
are tables.
"""

import logging
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as sf

from etl.minhash import NUM_HASHES, band_hashes, similarity

log = logging.getLogger(__name__)
_BANDS = pa.schema([("band", pa.int32()), ("hash", pa.int64()), ("node", pa.int64())])
_EDGES = pa.schema([("u", pa.int64()), ("v", pa.int64())])


def near_duplicate_edges(signatures: DataFrame, threshold: float) -> DataFrame:
    """Pairs (u, v), u < v, whose signatures agree in `threshold` of their bins, from a table (node
    long, signature binary: NUM_HASHES little-endian u32).

    Of the documents that share a band, each is compared with the first and with the one before it:
    as many pairs as documents, not their square.
    """

    def explode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if batch.num_rows:
                yield _bands_of(batch, threshold)

    bands = signatures.mapInArrow(explode, "band int, hash long, node long")
    bucket = Window.partitionBy("band", "hash")
    pairs = bands.select(
        "node",
        sf.min("node").over(bucket).alias("first"),
        sf.lag("node").over(bucket.orderBy("node")).alias("before"),
    )
    stars = pairs.select(sf.col("first").alias("u"), sf.col("node").alias("v"))
    chains = pairs.select(sf.col("before").alias("u"), sf.col("node").alias("v"))
    candidates = stars.unionByName(chains).where("u < v").distinct()
    left = signatures.selectExpr("node as u", "signature as a")
    right = signatures.selectExpr("node as v", "signature as b")

    def check(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield _near_pairs(batch, threshold)

    joined = candidates.join(left, "u").join(right, "v").select("u", "v", "a", "b")
    return joined.mapInArrow(check, "u long, v long")


def _bands_of(batch: pa.RecordBatch, threshold: float) -> pa.RecordBatch:
    hashes = band_hashes(_signatures(batch.column("signature")), threshold)
    count, bands = hashes.shape
    nodes = np.repeat(batch.column("node").to_numpy(zero_copy_only=False), bands)
    numbers = np.tile(np.arange(bands, dtype=np.int32), count)
    return pa.RecordBatch.from_arrays(
        [pa.array(numbers), pa.array(hashes.ravel()), pa.array(nodes)], schema=_BANDS
    )


def _signatures(column: pa.Array) -> np.ndarray:
    data = b"".join(column.to_pylist())
    return np.frombuffer(data, "<u4").reshape(-1, NUM_HASHES)


def _near_pairs(batch: pa.RecordBatch, threshold: float) -> pa.RecordBatch:
    a, b = (_signatures(batch.column(name)) for name in ("a", "b"))
    is_near = pa.array(similarity(a, b) >= threshold)
    arrays = [batch.column(name).filter(is_near) for name in ("u", "v")]
    return pa.RecordBatch.from_arrays(arrays, schema=_EDGES)


def connected_components(edges: DataFrame) -> DataFrame:
    """(node, component) of every node with an edge; a component is named by its smallest node.

    Large-star and small-star in turn (Kiveris et al. 2014, "Connected Components in MapReduce and
    Beyond") until nothing changes; then every edge leads to its component's smallest node.
    """
    context = edges.sparkSession.sparkContext
    current = _oriented(edges).persist()
    before, round_number = _state(current), 0
    while True:
        round_number += 1
        context.setJobDescription(f"prepare: connect near-duplicates, round {round_number}")
        following = _checkpoint(_small_star(_large_star(current)))
        after = _state(following)
        current.unpersist()
        current = following
        log.info("near-duplicates, round %d: %d links", round_number, after[0])
        if after == before:
            break
        before = after
    leaves = current.selectExpr("u as node", "v as component")
    roots = current.selectExpr("v as node", "v as component").distinct()
    return leaves.unionByName(roots)


def _checkpoint(edges: DataFrame) -> DataFrame:
    """Cuts the plan, which would double every round. On a cluster each block is kept by two
    executors, since a lost one cannot be computed again."""
    is_local = str(edges.sparkSession.sparkContext.master).startswith("local")
    level = StorageLevel.MEMORY_AND_DISK if is_local else StorageLevel.MEMORY_AND_DISK_2
    return edges.localCheckpoint(storageLevel=level)


def _oriented(edges: DataFrame) -> DataFrame:
    """Distinct edges with u > v."""
    larger, smaller = sf.greatest("u", "v"), sf.least("u", "v")
    return edges.select(larger.alias("u"), smaller.alias("v")).where("u > v").distinct()


def _large_star(edges: DataFrame) -> DataFrame:
    """Links the larger neighbors of each node to the least of its neighborhood."""
    both = edges.unionByName(edges.selectExpr("v as u", "u as v"))
    least = both.groupBy("u").agg(sf.min("v").alias("least"))
    least = least.select("u", sf.least("u", "least").alias("least"))
    return both.join(least, "u").where("v > u").selectExpr("v as u", "least as v").distinct()


def _small_star(edges: DataFrame) -> DataFrame:
    """Links the smaller neighbors of each node, and itself, to the least of them."""
    least = edges.groupBy("u").agg(sf.min("v").alias("least"))
    linked = edges.join(least, "u").selectExpr("v as u", "least as v")
    itself = least.selectExpr("u", "least as v")
    return linked.unionByName(itself).where("u > v").distinct()


def _state(edges: DataFrame) -> tuple[int, int]:
    """Number of edges and a sum over them: equal if nothing changed."""
    row = edges.agg(
        sf.count("*").alias("count"), sf.sum(sf.xxhash64("u", "v").cast("decimal(38)")).alias("sum")
    ).first()
    assert row is not None
    return int(row["count"]), int(row["sum"] or 0)
