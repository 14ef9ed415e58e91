import os
import time
from dataclasses import fields, replace

import fsspec
import numpy as np
import pytest

from etl.cache import CACHE_VARIABLE
from indexing.join_plan import JoinConfig
from indexing.joined import JoinedError
from indexing.joined_manifest import open_joined
from model.checkpoint import latest_checkpoint
from model.samples import Batch, NeighborReader, SampleError, SampleReader
from model.streaming import BlockOrder, JoinedReader
from tests.plain_join import join_plainly
from tests.ranks import Ranks, train
from tests.s3_server import Rule, s3_server
from tests.training_job import assert_equal_tensors, job, losses, tensors


@pytest.mark.parametrize(
    ("samples", "block", "window"), [(100, 8, 3), (64, 8, 8), (5, 8, 2), (7, 1, 3)]
)
def test_every_sample_comes_once_an_epoch_and_epochs_differ(samples, block, window):
    order = BlockOrder(samples, block, window, seed=0)
    epochs = order.samples(0, 3 * samples).reshape(3, samples)
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(samples))
    assert samples < 10 or not np.array_equal(epochs[0], epochs[1])


def test_the_order_has_no_state():
    order = BlockOrder(100, 8, 3, seed=1)
    whole = order.samples(0, 250)
    parts = [order.samples(start, min(37, 250 - start)) for start in range(0, 250, 37)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(BlockOrder(100, 8, 3, seed=2).samples(0, 250), whole)


def test_a_window_holds_its_blocks_and_no_others():
    order = BlockOrder(100, 8, 3, seed=1)
    for start in range(0, 96, 24):
        found = order.samples(start, 24)
        assert len(np.unique(found // 8)) == 3
        assert not np.array_equal(found, np.sort(found))
    assert [order.find(place) for place in (0, 23, 24, 99, 100)] == [
        (0, 0),
        (0, 23),
        (1, 0),
        (4, 3),
        (5, 0),
    ]
    assert np.array_equal(order.window(4), np.sort(order.samples(96, 4))[order.window(4) - 96])


def test_orders_of_nothing_are_refused():
    for samples, window in ((0, 1), (1, 0)):
        with pytest.raises(SampleError, match="expected 1 or more"):
            BlockOrder(samples, 8, window, 0)


@pytest.fixture(scope="module")
def joined_url(data, tmp_path_factory):
    config = JoinConfig(
        dataset_url=data.training.url,
        map_url=data.map.url,
        retrieval_url=data.retrieval.url,
        output_url=str(tmp_path_factory.mktemp("joined")),
        seq_length=64,
        samples_per_block=4,
        blocks_per_shard=3,
    )
    return join_plainly(config).url


def assert_equal_batches(found, expected):
    for field in fields(Batch):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert np.array_equal(one, other), field.name
        assert getattr(one, "dtype", None) == getattr(other, "dtype", None)


@pytest.mark.parametrize("neighbors", [0, 1, 2])
def test_streamed_samples_are_those_of_the_datasets_themselves(neighbors, joined_url, data):
    retrieval = None
    if neighbors:
        retrieval = NeighborReader.open(data.training, data.map, data.retrieval, neighbors)
    whole = SampleReader(data.training, 64, retrieval)
    reader = JoinedReader(open_joined(joined_url), 64, neighbors, held_blocks=2)
    assert reader.num_samples == whole.num_samples
    numbers = np.random.default_rng(0).permutation(reader.num_samples)
    for part in np.array_split(numbers, 5):
        assert_equal_batches(reader.read(part), whole.read(part))


def test_memory_holds_as_many_blocks_as_allowed(joined_url):
    reader = JoinedReader(open_joined(joined_url), 64, 2, held_blocks=3)
    for i in range(reader.joined.manifest.num_blocks):
        reader.fetch([i])
        assert len(reader._held) <= 3


def test_samples_of_another_shape_are_refused(joined_url):
    for length, neighbors in ((128, 2), (64, 3)):
        with pytest.raises(SampleError, match="samples of 64 tokens with 2 neighbors a chunk"):
            JoinedReader(open_joined(joined_url), length, neighbors, 2)


def test_blocks_are_fetched_once_a_machine_if_asked(joined_url, monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    expected = JoinedReader(open_joined(joined_url), 64, 2, 2).read(np.arange(9))
    for _ in range(2):
        reader = JoinedReader(open_joined(joined_url), 64, 2, 2, use_cache=True)
        assert_equal_batches(reader.read(np.arange(9)), expected)
        copies = sorted((p.name, p.stat().st_ino) for p in (tmp_path / "cache").iterdir())
        assert len(copies) == 3
    [copy, *_] = (tmp_path / "cache").iterdir()
    copy.write_bytes(bytes(copy.stat().st_size))
    with pytest.raises(JoinedError, match="checksum"):
        JoinedReader(open_joined(joined_url), 64, 2, 2, use_cache=True).read(np.arange(9))


STREAMED = {
    "data__train_url": None,
    "data__train_map_url": None,
    "data__retrieval_url": None,
    "data__window_blocks": 2,
}


@pytest.mark.dist
def test_a_streamed_run_continues_exactly_on_any_number_of_ranks(joined_url, data, tmp_path):
    changes = STREAMED | {"data__joined_url": joined_url, "data__validation_joined_url": joined_url}
    config = job(data, tmp_path / "whole", **changes)
    result = train(config, 2, tmp_path)
    assert result["val_loss_on"] != result["val_loss_off"]
    expected = losses(tmp_path / "whole")
    for before, after in ((2, 2), (2, 1), (1, 4)):
        parts = replace(config, output_url=str(tmp_path / f"{before}-{after}"))
        short = replace(parts, trainer=replace(parts.trainer, stop_after_steps=3))
        train(short, before, tmp_path)
        train(parts, after, tmp_path)
        found = losses(parts.output_url)
        assert found.keys() == expected.keys()
        assert max(abs(found[step] - expected[step]) for step in found) < 1e-6 * expected[1]
        if before == after:
            assert_equal_tensors(tensors(parts.output_url), tensors(tmp_path / "whole"))


@pytest.mark.dist
def test_a_streamed_run_that_was_killed_goes_on_with_other_ranks(joined_url, data, tmp_path):
    changes = STREAMED | {"data__joined_url": joined_url, "trainer__max_steps": 12}
    train(job(data, tmp_path / "whole", **changes), 1, tmp_path)
    config = job(data, tmp_path / "killed", checkpoint__interval=1, **changes)
    for ranks in (2, 4, 1):
        started = Ranks(config, ranks, tmp_path)
        before = saved_step(config.output_url)
        while any(p.is_alive() for p in started.processes):
            if saved_step(config.output_url) > before + 1 and ranks > 1:
                started.kill(range(ranks))
            time.sleep(0.01)
        started.wait()
    other = Ranks(replace(config, data=replace(config.data, window_blocks=3)), 1, tmp_path)
    assert other.wait() == [2], "another order of samples"
    found, expected = losses(tmp_path / "killed"), losses(tmp_path / "whole")
    assert found.keys() == expected.keys() == set(range(1, 13))
    assert max(abs(found[step] - expected[step]) for step in found) < 1e-6 * expected[1]


def saved_step(output_url):
    record = latest_checkpoint(output_url)
    return record["progress"]["step"] if record else 0


@pytest.mark.dist
def test_faults_of_the_storage_change_nothing(joined_url, data, tmp_path, monkeypatch):
    """503s, resets, cut bodies and slow replies, against a run from the local disk."""
    local = STREAMED | {"data__joined_url": joined_url}
    train(job(data, tmp_path / "local", **local), 2, tmp_path)
    with s3_server(monkeypatch) as proxy:
        filesystem = fsspec.filesystem("s3")
        filesystem.mkdir("retromill-stream")
        filesystem.put(joined_url, "retromill-stream/joined", recursive=True)
        url = "s3://retromill-stream/joined"
        faults = ("503", "reset", "cut", "slow")
        proxy.rules += [Rule(r"GET .*/shard-.*\.joined", fault, times=3) for fault in faults]
        remote = job(data, tmp_path / "remote", **(STREAMED | {"data__joined_url": url}))
        settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        train(remote, 2, tmp_path, environment=settings)
        assert [rule.hits for rule in proxy.rules] == [3] * len(faults)
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    assert_equal_tensors(tensors(tmp_path / "remote"), tensors(tmp_path / "local"))
