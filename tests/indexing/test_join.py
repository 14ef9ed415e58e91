"""The join on Spark against what a trainer reads from the datasets themselves."""

import os
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest

from etl.cache import CACHE_VARIABLE
from etl.dataset import Dataset
from etl.storage import StageFolder, StorageError, StoredFile, create_json
from indexing.join import join
from indexing.join_plan import JoinConfig, describe_join, plan_join
from indexing.join_shards import JoinTask, Payloads, PayloadSource
from indexing.joined import JoinedError
from indexing.joined_manifest import NAME, open_joined
from jobs.join_neighbors import run
from model.samples import NeighborReader, SampleReader
from tests import small_data

pytestmark = pytest.mark.spark
LENGTH, K = 64, 2
FIELDS = ("tokens", "starts", "keys", "neighbor_ids", "neighbor_keys", "neighbor_tokens")


@pytest.fixture(scope="module")
def near_map(data, tmp_path_factory):
    """Rows of five where a sample's own documents are frequent, the last ids and whole rows
    missing."""
    rng = np.random.default_rng(3)
    shape = (data.training.num_chunks, 5)
    spans = data.retrieval.chunk_spans(
        data.training.chunk_keys(np.arange(data.training.num_chunks))[:, 0]
    )
    near = spans[:, :1] + rng.integers(-6, 6, shape)
    anywhere = rng.integers(0, data.retrieval.num_chunks, shape)
    ids = np.where(rng.random(shape) < 0.6, near, anywhere) % data.retrieval.num_chunks
    ids[rng.random(len(ids)) < 0.1, 2:] = -1
    ids[: shape[0] // 4] = -1
    return write_map(tmp_path_factory.mktemp("near"), data, ids)


def write_map(folder, data, ids):
    known = {"index_fingerprint": "of an index"}
    return small_data.write_map(folder, data.training, data.retrieval, ids, **known)


@pytest.fixture
def config(data, near_map, tmp_path):
    return JoinConfig(
        dataset_url=data.training.url,
        map_url=near_map.url,
        retrieval_url=data.retrieval.url,
        output_url=str(tmp_path / "joined"),
        seq_length=LENGTH,
        K_keep=3,
        samples_per_block=2,
        blocks_per_shard=2,
        num_partitions=2,
    )


def joined(config, spark):
    join(plan_join(config), config.num_partitions, lambda: spark)
    return open_joined(plan_join(config).folder.url)


def whole(dataset):
    """All blocks' arrays, one after another."""
    blocks = [dataset.block(i) for i in range(dataset.manifest.num_blocks)]
    return {name: np.concatenate([getattr(b, name) for b in blocks]) for name in FIELDS}


def brute_force(data, knn_map, seq_length, keep):
    """The join by its definition, sample by sample."""
    training, retrieval = Dataset(data.training.url), Dataset(data.retrieval.url)
    size, chunks = training.chunk_size, seq_length // training.chunk_size
    pad, total = training.manifest.pad_id, training.num_chunks
    firsts = set(training.document_first_chunk.tolist())
    found = {name: [] for name in FIELDS}
    for sample in range(-(-(total * size - 1) // seq_length)):
        ids = range(sample * chunks, (sample + 1) * chunks + 1)
        own = {i: training.chunk_keys([i])[0].tolist() for i in ids[:-1] if i < total}
        banned = {key for keys in own.values() for key in keys}
        stream = [training.get_chunk([i])[0] if i < total else [pad] * size for i in ids]
        found["tokens"].append(np.concatenate(stream)[: seq_length + 1])
        found["starts"].append([int(i in firsts and i < total) for i in ids])
        found["keys"].append([own.get(i, [0, 0]) for i in ids[:-1]])
        picked = []
        for i in ids[:-1]:
            row = [int(n) for n in knn_map.get([i])[0] if n >= 0] if i < total else []
            allowed = [n for n in row if not banned & set(retrieval.chunk_keys([n])[0].tolist())]
            picked.append((allowed + [-1] * keep)[:keep])
        keys = [[retrieval.chunk_keys([n])[0] if n >= 0 else [0, 0] for n in r] for r in picked]
        tokens = [
            [retrieval.get_chunk([n])[0] if n >= 0 else [pad] * 2 * size for n in r] for r in picked
        ]
        for name, value in zip(FIELDS[3:], (picked, keys, tokens), strict=True):
            found[name].append(value)
    return {name: np.asarray(found[name], np.uint64 if "keys" in name else None) for name in FIELDS}


def test_the_join_is_what_its_definition_gives(config, data, near_map, spark):
    found = whole(joined(config, spark))
    expected = brute_force(data, near_map.load(), LENGTH, 3)
    for name in FIELDS:
        assert np.array_equal(found[name], expected[name]), name
    ids, rows = found["neighbor_ids"], near_map.load().neighbors
    assert (ids >= 0).any()
    assert (ids[..., 0] != plain_first(rows, ids.shape)).any(), "the ban changed nothing"


def plain_first(rows, shape):
    first = np.full(shape[0] * shape[1], -1)
    first[: len(rows)] = rows[:, 0]
    return first.reshape(shape[:2])


@pytest.mark.parametrize("neighbors", [1, 2, 3])
def test_a_trainer_gets_the_samples_it_would_read_itself(config, data, near_map, spark, neighbors):
    retrieval = NeighborReader.open(data.training, near_map, data.retrieval, neighbors)
    reader = SampleReader(data.training, LENGTH, retrieval)
    expected = reader.read(np.arange(reader.num_samples))
    dataset = joined(config, spark)
    found, pad = whole(dataset), dataset.manifest.pad_id
    assert dataset.manifest.num_samples == reader.num_samples
    tokens, neighbor_tokens = found["tokens"], found["neighbor_tokens"][:, :, :neighbors]
    assert np.array_equal(tokens[:, :-1], expected.tokens)
    assert np.array_equal(tokens[:, 1:], expected.labels)
    is_text = tokens != pad
    assert np.array_equal(is_text[:, :-1], expected.tokens_mask)
    loss_mask = is_text[:, :-1] & is_text[:, 1:]
    size = data.training.chunk_size
    loss_mask[:, size - 1 :: size] &= found["starts"][:, 1:] == 0
    assert np.array_equal(loss_mask, expected.loss_mask)
    assert np.array_equal(neighbor_tokens, expected.neighbors)
    assert np.array_equal(neighbor_tokens != pad, expected.neighbors_mask)


def test_any_number_of_partitions_gives_the_same_bytes(config, spark, tmp_path):
    found = []
    for partitions, rows in ((1, 100_000), (2, 5), (7, 64)):
        url = str(tmp_path / str(partitions))
        sized = replace(config, num_partitions=partitions, output_url=url)
        with batches_of(spark, rows):
            found.append(joined(sized, spark).manifest)
    assert len(found[0].shards) > 2
    assert found[0] == found[1] == found[2]


@contextmanager
def batches_of(spark, rows):
    name = "spark.sql.execution.arrow.maxRecordsPerBatch"
    before = spark.conf.get(name)
    spark.conf.set(name, rows)
    try:
        yield
    finally:
        spark.conf.set(name, before)


def test_a_shard_without_any_neighbor_is_written(config, spark):
    dataset = joined(config, spark)
    block = dataset.block(0)
    assert (block.neighbor_ids == -1).all()
    assert (block.neighbor_tokens == dataset.manifest.pad_id).all()


def test_a_finished_join_does_nothing_again(config, spark):
    task = plan_join(config)
    first = join(task, 2, lambda: spark)
    assert join(task, 2, lambda: pytest.fail("Spark was asked for")) == first


def test_only_a_shard_without_a_record_is_joined_again(config, spark):
    first = joined(config, spark)
    folder = StageFolder(first.url)
    times = written(first)
    os.unlink(folder.path_of("shard-000001.json"))
    os.unlink(folder.path_of(first.manifest.shards[1].data.name))
    again = joined(config, spark)
    assert again.manifest == first.manifest
    changed = [i for i, (a, b) in enumerate(zip(times, written(again), strict=True)) if a != b]
    assert changed == [1]


def written(dataset):
    folder = StageFolder(dataset.url)
    names = [shard.data.name for shard in dataset.manifest.shards]
    return [os.stat(folder.path_of(name)).st_mtime_ns for name in names]


def test_compressed_blocks_hold_the_same_samples(config, spark):
    plain = joined(config, spark)
    small = joined(replace(config, compression="zstd"), spark)
    assert small.url != plain.url
    assert small.manifest.stored_bytes < plain.manifest.stored_bytes
    expected = whole(plain)
    for name, array in whole(small).items():
        assert np.array_equal(array, expected[name]), name


def test_the_job_prints_where_the_samples_are(config, spark):
    plan = run(replace(config, dry_run=True))
    assert not os.path.exists(plan["joined_url"])
    result = run(config)
    dataset = open_joined(result["joined_url"])
    assert result["joined_url"] == plan["joined_url"]
    assert result["samples"] == plan["samples"] == dataset.manifest.num_samples
    assert result["shards"] == plan["shards"] == len(dataset.manifest.shards)
    headers = sum(64 + shard.index.bytes for shard in dataset.manifest.shards)
    assert result["bytes"] == plan["bytes"] + headers


def test_whatever_determines_the_content_is_in_the_folder_name(config):
    changes = [
        {"seq_length": 32},
        {"K_keep": 2},
        {"samples_per_block": 3},
        {"blocks_per_shard": 3},
        {"compression": "zstd"},
    ]
    names = {plan_join(replace(config, **change)).folder.url for change in [{}, *changes]}
    assert len(names) == 1 + len(changes)
    assert plan_join(replace(config, num_partitions=9)).folder.url in names


def test_a_map_of_other_datasets_is_refused(config, data, near_map, tmp_path):
    stage = StageFolder(str(tmp_path / "other"))
    stage.publish("knn", near_map.manifest | {"retrieval_fingerprint": "of another"})
    with pytest.raises(StorageError, match="of another"):
        plan_join(replace(config, map_url=stage.url))
    swapped = replace(config, dataset_url=data.retrieval.url)
    with pytest.raises(StorageError, match="was made for the training dataset"):
        plan_join(swapped)


def test_a_map_of_some_of_the_chunks_is_refused(config, data, tmp_path):
    part = write_map(tmp_path, data, np.zeros((5, 4), np.int64))
    with pytest.raises(StorageError, match="holds 5 chunks from 0"):
        plan_join(replace(config, map_url=part.url))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"K_keep": 6}, "K_keep is 6; .* holds 5 a chunk"),
        ({"seq_length": 24}, "not a multiple"),
        ({"num_partitions": 0}, "num_partitions is 0"),
    ],
)
def test_impossible_sizes_are_refused(config, change, message):
    with pytest.raises(JoinedError, match=message):
        plan_join(replace(config, **change))


def test_neighbors_that_do_not_exist_are_refused_by_name(config, data, spark, tmp_path):
    rows = np.full((data.training.num_chunks, 3), data.retrieval.num_chunks)
    wrong = replace(config, map_url=write_map(tmp_path, data, rows).url)
    with pytest.raises(JoinedError, match=rf"{data.retrieval.num_chunks} in the map; .* holds"):
        joined(wrong, spark)


def local_payloads(task: JoinTask, i):
    """A shard's payloads without a shuffle."""
    source, retrieval = PayloadSource(task), Dataset(task.retrieval_url)
    records = [task.store_documents(s) for s in range(len(retrieval.manifest.shards))]
    files = [StoredFile(**record["files"]["table"]) for record in records]
    *parts, start = task.requests(i, files)
    for part in (start, *parts):
        yield Payloads(part.slots, source.read(part.chunks))


def join_without_spark(task):
    records = [task.write(i, local_payloads(task, i)) for i in range(task.num_shards)]
    return task.manifest(records)


def test_everything_on_s3_gives_the_same_bytes_and_fetches_no_whole_map(
    config, near_map, s3, tmp_path, monkeypatch
):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    urls = {}
    for name in ("dataset_url", "map_url", "retrieval_url"):
        urls[name] = f"s3://bucket/joins/{name}"
        fsspec.filesystem("s3").put(getattr(config, name), urls[name], recursive=True)
    config = replace(config, blocks_per_shard=16)
    remote = plan_join(replace(config, **urls, output_url="s3://bucket/joins"))
    manifest = join_without_spark(remote)
    assert manifest == join_without_spark(plan_join(config))
    create_json(remote.folder.path_of(NAME), manifest.to_json())
    assert whole(open_joined(remote.folder.url))["tokens"].shape[0] == manifest.num_samples
    copies = {path.name for path in (tmp_path / "cache").iterdir()}
    assert copies
    assert near_map.manifest["files"]["map"]["sha256"] not in copies


def test_a_torn_shuffle_is_noticed(config):
    task = plan_join(config)
    shard = task.num_shards - 2
    parts = list(local_payloads(task, shard))
    slots = np.concatenate([part.slots for part in parts])
    rows = np.concatenate([part.rows for part in parts])
    broken = {
        "without the start": slice(1, None),
        "without its first": np.r_[0, 2 : len(slots)],
        "without its last": slice(0, -1),
        "the first half": slice(0, len(slots) // 2),
        "only the start": slice(0, 1),
        "nothing": slice(0, 0),
        "one twice": np.r_[0:5, 4 : len(slots)],
        "the last twice": np.r_[0 : len(slots), len(slots) - 1],
        "two exchanged": np.r_[0:3, 4, 3, 5 : len(slots)],
    }
    for name, kept in broken.items():
        with pytest.raises(JoinedError, match=f"shard {shard} of the join"):
            task.write(shard, iter([Payloads(slots[kept], rows[kept])]))
        assert task.folder.record(task.record_name(shard)) is None, name
    pieces = (Payloads(slots[i : i + 3], rows[i : i + 3]) for i in range(0, len(slots), 3))
    assert task.write(shard, pieces)["num_samples"] == len(task.samples_of(shard))


def test_no_document_starts_beyond_the_dataset(config):
    """Its last document has one chunk, which is what is read in place of those beyond."""
    task, documents = plan_join(config), np.asarray([0, 0, 1])
    training = SimpleNamespace(
        num_chunks=3,
        get_chunk=lambda ids: np.ones((len(ids), 16), np.uint16),
        chunk_to_doc=lambda ids: documents[ids],
        chunk_keys=lambda ids: np.stack([documents[ids] + 5] * 2, axis=-1).astype(np.uint64),
    )
    none = Payloads(np.empty(0, np.int64), np.empty((0, task.payload_bytes), np.uint8))
    block = task._block(training, range(1), none)
    assert block.starts.tolist() == [[1, 0, 1, 0, 0]]
    assert block.keys[0, :, 0].tolist() == [5, 5, 6, 0]
    assert (block.tokens[0, 48:] == task.parents["pad_id"]).all()


def test_the_plan_says_what_it_will_cost(config):
    task = plan_join(config)
    plan = describe_join(task, 2)
    assert plan["requests"] == task.num_samples * 4 * 3
    assert plan["shuffle_bytes"] > plan["requests"] * task.payload_bytes
    assert describe_join(task, 4)["shuffle_bytes_a_partition"] < plan["shuffle_bytes_a_partition"]
    assert plan["stored_bytes"] == plan["bytes"]


def test_the_plan_measures_what_compression_gains(config, spark):
    plan = describe_join(plan_join(replace(config, compression="zstd")), 2)
    stored = joined(replace(config, compression="zstd"), spark).manifest.shards
    found = sum(shard.data.bytes for shard in stored)
    assert found < plan["bytes"]
    assert plan["stored_bytes"] == pytest.approx(found, rel=0.3)


def test_what_attempts_left_behind_is_removed(config, spark):
    task = plan_join(config)
    leftover = task.folder.path_of("shard-000000-0000.joined")
    os.makedirs(task.folder.url)
    with open(leftover, "wb") as file:
        file.write(b"of a killed task")
    dataset = joined(config, spark)
    assert not os.path.exists(leftover)
    assert os.path.exists(StageFolder(dataset.url).path_of(NAME))
