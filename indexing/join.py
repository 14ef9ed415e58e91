"""The join of training chunks with their neighbors' tokens: four steps with two shuffles.

    documents  by retrieval shard       -> a stored table of its documents' keys
    requests   by shard of samples      -> (retrieval shard, chunk, shard, slot)
    answers    by retrieval shard,      -> (shard, slot, payload)
               ascending chunks
    shards     by shard of samples,     -> a stored file and its record
               ascending slots

So each part of the retrieval dataset is read by one task, in order, and each output file is
written by one task, in order. What a task does is in `join_shards.py`; the bytes do not depend on
the number of partitions. Shards that have a record are left out. Spark file.
"""

import logging
import re
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from operator import itemgetter

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.errors import PythonException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf

from etl.dataset import Dataset
from etl.deadline import RemoteError
from etl.storage import StoredFile, create_json, read_json, write_json
from indexing.join_shards import JoinTask, Payloads, PayloadSource
from indexing.joined import JoinedError
from indexing.joined_manifest import NAME, JoinedManifest

log = logging.getLogger(__name__)
_REQUEST = "retrieval_shard int, chunk long, shard int, slot long"
_ANSWER = "shard int, slot long, payload binary"


def join(
    task: JoinTask, num_partitions: int, session: Callable[[], SparkSession]
) -> JoinedManifest:
    """Runs or continues the join; returns the manifest it wrote.

    `session` is called only if there is work left for Spark.

    Raises:
        JoinedError: a task found something that cannot be, like a neighbor that does not exist.
        RemoteError: the storage failed a task several times.
    """
    names = [task.record_name(i) for i in range(task.num_shards)]
    done = task.folder.records(names)
    missing = [i for i, name in enumerate(names) if name not in done]
    log.info("%d of %d shards to join in %s", len(missing), len(names), task.folder.url)
    if missing:
        try:
            _run_tasks(task, missing, num_partitions, session())
        except PythonException as error:
            if ours := _own_error(error):
                raise ours from error
            raise
    records = task.folder.all_records(names, "run the job again")
    manifest = task.manifest(records)
    url = task.folder.path_of(NAME)
    if not create_json(url, manifest.to_json()) and read_json(url)["fingerprint"] != (
        manifest.fingerprint
    ):
        write_json(url, manifest.to_json())
    named = {NAME, *(f"{name}.json" for name in names)}
    task.folder.remove_unnamed(
        named | {file["name"] for record in records for file in record["files"].values()}
    )
    return manifest


def _run_tasks(
    task: JoinTask, missing: list[int], num_partitions: int, spark: SparkSession
) -> None:
    documents = _find_documents(task, num_partitions, spark)
    spark.sparkContext.setJobDescription(f"join: {len(missing)} shards of samples")
    positions = _positions(spark, missing, num_partitions)
    requests = _requests(task, positions, missing, documents)
    by_chunk = _partitioned(requests, num_partitions, "retrieval_shard")
    answers = _answers(task, by_chunk.sortWithinPartitions("chunk"))
    by_slot = _partitioned(answers, num_partitions, "shard")
    _shards(task, by_slot.sortWithinPartitions("shard", "slot")).collect()


def _positions(spark: SparkSession, work: list[int], num_partitions: int) -> DataFrame:
    return spark.range(0, len(work), 1, min(len(work), num_partitions))


def _find_documents(task: JoinTask, num_partitions: int, spark: SparkSession) -> list[StoredFile]:
    """The stored document tables of all retrieval shards; those that are there are not made
    again."""
    numbers = range(len(Dataset(task.retrieval_url).manifest.shards))
    names = [task.documents_name(i) for i in numbers]
    done = task.folder.records(names)
    missing = [i for i, name in zip(numbers, names) if name not in done]
    if missing:
        spark.sparkContext.setJobDescription(f"join: documents of {len(missing)} retrieval shards")

        def store(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                for position in batch.column("id").to_pylist():
                    task.store_documents(missing[position])
                yield batch

        positions = _positions(spark, missing, num_partitions)
        positions.mapInArrow(store, "id long").collect()
    records = task.folder.all_records(names, "run the job again")
    return [StoredFile(**record["files"]["table"]) for record in records]


def _partitioned(rows: DataFrame, num_partitions: int, column: str) -> DataFrame:
    """Equal numbers in one partition. A count that was asked for is not changed at run time."""
    return rows.repartitionById(num_partitions, sf.pmod(column, sf.lit(num_partitions)))


def _requests(
    task: JoinTask, positions: DataFrame, missing: list[int], documents: list[StoredFile]
) -> DataFrame:
    def request(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for position in batch.column("id").to_pylist():
                shard = missing[position]
                for part in task.requests(shard, documents):
                    shards = np.full(len(part.slots), shard, np.int32)
                    yield pa.RecordBatch.from_pydict(
                        {
                            "retrieval_shard": part.retrieval_shards,
                            "chunk": part.chunks,
                            "shard": shards,
                            "slot": part.slots,
                        }
                    )

    return positions.mapInArrow(request, _REQUEST)


def _answers(task: JoinTask, requests: DataFrame) -> DataFrame:
    def answer(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        source = PayloadSource(task)
        for batch in batches:
            rows = source.read(_integers(batch, "chunk"))
            columns = {name: batch.column(name) for name in ("shard", "slot")}
            yield pa.RecordBatch.from_pydict({**columns, "payload": _binary(rows)})

    return requests.mapInArrow(answer, _ANSWER)


def _shards(task: JoinTask, answers: DataFrame) -> DataFrame:
    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        pieces = (piece for batch in batches for piece in _by_shard(batch, task.payload_bytes))
        for shard, group in groupby(pieces, itemgetter(0)):
            if task.folder.record(task.record_name(shard)) is None:
                task.write(shard, (payloads for _, payloads in group))
            yield pa.RecordBatch.from_pydict({"shard": np.asarray([shard], np.int32)})

    return answers.mapInArrow(write, "shard int")


def _by_shard(batch: pa.RecordBatch, width: int) -> Iterator[tuple[int, Payloads]]:
    """The payloads of each shard in a batch that is sorted by shard."""
    shards, slots = _integers(batch, "shard"), _integers(batch, "slot")
    rows = _fixed_rows(batch.column("payload"), width)
    bounds = [0, *(np.flatnonzero(shards[1:] != shards[:-1]) + 1).tolist(), len(shards)]
    for start, stop in pairwise(bounds):
        if start < stop:
            yield int(shards[start]), Payloads(slots[start:stop], rows[start:stop])


def _integers(batch: pa.RecordBatch, name: str) -> NDArray[np.int64]:
    return batch.column(name).to_numpy(zero_copy_only=False).astype(np.int64)


def _binary(rows: NDArray[np.uint8]) -> pa.Array:
    """Rows u8[n, width] as n byte strings."""
    count, width = rows.shape
    offsets = np.arange(count + 1, dtype=np.int32) * np.int32(width)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(rows))]
    return pa.Array.from_buffers(pa.binary(), count, buffers)


def _fixed_rows(column: pa.Array, width: int) -> NDArray[np.uint8]:
    """u8[n, width] n byte strings of `width` bytes.

    Raises:
        JoinedError: of another length.
    """
    try:
        fixed = column.cast(pa.binary(width))
    except pa.ArrowInvalid as error:
        raise JoinedError(f"expected payloads of {width} bytes: {error}") from None
    data = np.frombuffer(fixed.buffers()[1], np.uint8, len(fixed) * width, fixed.offset * width)
    return data.reshape(len(fixed), width)


def _own_error(error: PythonException) -> JoinedError | RemoteError | None:
    """One of our own errors that a task raised, without the traceback Spark wraps it in."""
    found = re.search(r"^(?:etl|indexing)\.(\w+)\.\w+Error: (.+)$", str(error), re.MULTILINE)
    if found is None:
        return None
    return RemoteError(found[2]) if found[1] == "deadline" else JoinedError(found[2])
