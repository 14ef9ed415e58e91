"""What a run refuses to start on, and the copies it makes."""

import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from etl.cache import CACHE_BYTES_VARIABLE, CACHE_VARIABLE
from etl.dataset import Dataset
from etl.storage import StorageError, read_json, write_json
from model.mixture import MixtureError
from model.samples import SampleError
from model.training_data import DataConfig, DataError, open_data


def config(data, **changes):
    whole = DataConfig(
        train_url=data.training.url,
        train_map_url=data.map.url,
        retrieval_url=data.retrieval.url,
        seq_length=64,
    )
    return replace(whole, **changes)


def edited(url, folder, **changes):
    """A copy of a dataset or map whose manifest says something else."""
    copy = Path(shutil.copytree(url, folder))
    [path] = [*copy.glob("manifest.json"), *copy.glob("knn.json")]
    write_json(str(path), read_json(str(path)) | changes)
    return str(copy)


def test_fingerprints_name_everything_a_run_was_made_from(data):
    found = open_data(config(data), True, 0).fingerprints
    assert found["tokenizer"] == data.training.manifest.tokenizer_fingerprint
    assert found["train"] == [data.training.manifest.fingerprint]
    assert found["train_map"] == [data.map.fingerprint]
    assert found["retrieval"] == data.retrieval.manifest.fingerprint


def test_a_map_of_another_dataset_is_refused(data, tmp_path):
    wrong = edited(data.map.url, tmp_path / "map", retrieval_fingerprint="0" * 32)
    with pytest.raises(StorageError, match=f"retrieval dataset {'0' * 32}, but .* is"):
        open_data(config(data, train_map_url=wrong), True, 0)


def test_maps_of_different_indexes_are_refused(data, tmp_path):
    other = edited(data.map.url, tmp_path / "map", index_fingerprint="feed")
    with pytest.raises(StorageError, match=r"with the index feed, .* with None"):
        open_data(config(data, validation_url=data.training.url, validation_map_url=other), True, 0)


def test_another_tokenizer_or_chunk_size_is_refused(data, tmp_path, monkeypatch):
    other = Dataset(data.training.url)
    for name, value in (("tokenizer_fingerprint", "0" * 32), ("chunk_size", 32)):
        manifest = replace(other.manifest, **{name: value})
        monkeypatch.setattr(
            "model.training_data.Dataset", lambda url, m=manifest: _with(m, url, data)
        )
        with pytest.raises(StorageError, match=f"made with {name} {value}, .* prepare both alike"):
            open_data(config(data), True, 0)


def _with(manifest, url, data):
    dataset = Dataset(url)
    if url == data.retrieval.url:
        dataset.manifest = replace(manifest, split="retrieval")
    return dataset


def test_a_truncated_shard_is_found_before_the_first_step(data, tmp_path):
    folder = Path(shutil.copytree(data.training.url, tmp_path / "train"))
    path = max(folder.glob("*.bin"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-2])
    opened = open_data(config(data, train_url=str(folder)), True, 0)
    with pytest.raises(StorageError, match=f"{path.name}: .* bytes, its record says"):
        opened.open_all()


def test_a_truncated_map_is_refused(data, tmp_path):
    folder = Path(shutil.copytree(data.map.url, tmp_path / "map"))
    [path] = folder.glob("*.knn")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StorageError, match=f"{path.name}: .* bytes, its record says"):
        open_data(config(data, train_map_url=str(folder)), True, 0)


def test_options_that_contradict_each_other_are_refused(data):
    url, map_url = data.training.url, data.map.url
    for changes, with_retrieval, message in (
        ({"retrieval_url": None}, True, "needs data.retrieval_url"),
        ({"train_map_url": None}, True, "needs data.retrieval_url and data.train_map_url"),
        ({}, False, "have no effect on a plain decoder"),
        ({"train_url": [url, url]}, True, "2 datasets and data.train_map_url 1 maps"),
        ({"validation_url": url}, True, "go together"),
        (
            {"splits_string": "8,1,1", "validation_url": url, "validation_map_url": map_url},
            True,
            "neither with",
        ),
    ):
        with pytest.raises(DataError, match=message):
            open_data(config(data, **changes), with_retrieval, 0)
    with pytest.raises(MixtureError):
        open_data(
            config(data, train_url=[url] * 2, train_map_url=[map_url] * 2, train_weights=[1]),
            True,
            0,
        )
    plain = {"train_map_url": None, "retrieval_url": None}
    with pytest.raises(SampleError, match="retrieval dataset"):
        open_data(config(data, train_url=data.retrieval.url, **plain), False, 0)


def test_splitting_a_dataset_that_the_retrieval_set_holds_is_a_leak(data):
    with pytest.raises(StorageError, match="documents that are held out"):
        open_data(config(data, splits_string="80,20,0"), True, 0)


def test_a_split_by_documents_shares_none(data):
    plain = config(data, train_map_url=None, retrieval_url=None, splits_string="75,25,0")
    opened = open_data(plain, False, 0)
    assert opened.validation is not None
    chunks = []
    for reader in (opened.train.readers[0], opened.validation):
        ids, inside = reader.chunk_ids(np.arange(reader.num_samples))
        chunks.append(set(ids[:, :-1][inside[:, :-1]].tolist()))
    assert not chunks[0] & chunks[1]
    assert len(chunks[0] | chunks[1]) == data.training.num_chunks
    assert open_data(replace(plain, splits_string="100,0,0"), False, 0).validation is None


@pytest.fixture
def remote(data, monkeypatch, tmp_path):
    """The training dataset in memory://, and the folder of local copies."""
    filesystem = fsspec.filesystem("memory")
    filesystem.put(data.training.url, "/train", recursive=True)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    yield tmp_path / "cache"
    filesystem.rm("/train", recursive=True)


def plain_remote(data):
    maps = {"train_map_url": None, "retrieval_url": None}
    return config(data, train_url="memory://train", **maps)


def test_remote_shards_are_fetched_once_and_read_as_local_ones(data, remote):
    local = open_data(replace(plain_remote(data), train_url=data.training.url), False, 0)
    for _ in range(2):
        opened = open_data(plain_remote(data), False, 0)
        opened.open_all()
        copies = sorted((p.name, p.stat().st_mtime_ns) for p in remote.iterdir())
        assert np.array_equal(opened.train.read(0, 9).tokens, local.train.read(0, 9).tokens)
    assert len(copies) == 3 * len(data.training.manifest.shards)


def test_a_stale_or_cut_copy_is_not_used(data, remote):
    """Copies are named by content, so what a dataset's files were before is another copy."""
    open_data(plain_remote(data), False, 0).open_all()
    [cut, *_] = [remote / shard.bin.sha256 for shard in data.training.manifest.shards]
    cut.write_bytes(cut.read_bytes()[:100])
    opened = open_data(plain_remote(data), False, 0)
    opened.open_all()
    assert cut.stat().st_size == data.training.manifest.shards[0].bin.bytes


def test_shards_that_the_cache_cannot_hold_are_refused_before_they_are_fetched(
    data, remote, monkeypatch
):
    monkeypatch.setenv(CACHE_BYTES_VARIABLE, "1000")
    with pytest.raises(ValueError, match=r"local copies take .* RETROMILL_CACHE_BYTES allows 1000"):
        open_data(plain_remote(data), False, 0).open_all()
    assert not remote.exists()
