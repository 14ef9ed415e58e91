"""Index and map with everything on an S3 server: the bytes of local files, caches bounded."""

import os
import time

import fsspec
import pytest

from etl.cache import CACHE_BYTES_VARIABLE, CACHE_VARIABLE
from indexing.knn_manifest import open_map
from tests.indexing.job_runs import contents

pytestmark = pytest.mark.dask


@pytest.fixture
def old_copy(tmp_path):
    """A cache that holds a large object nobody asked for lately."""
    copy = tmp_path / "cache" / ("0" * 64)
    copy.parent.mkdir()
    copy.write_bytes(bytes(1 << 20))
    os.utime(copy, (time.time() - 5000,) * 2)
    return copy


def test_everything_on_s3_gives_the_bytes_of_local_files_and_caches_stay_bounded(
    remote_run, reference, old_copy
):
    cache = old_copy.parent
    environment = {CACHE_VARIABLE: str(cache), CACHE_BYTES_VARIABLE: str(1 << 20)}
    run = remote_run("plain")
    index_url = run.index(environment=environment, total_shards=3).result()["index_url"]
    job = run.map(index_url, environment=environment, total_shards=2)
    result = job.result()
    assert contents(index_url, result["map_url"]) == reference.contents
    assert index_url.startswith("s3://bucket/")
    assert not old_copy.exists()
    kept = [path for path in cache.iterdir() if path.stat().st_size]
    assert kept
    assert all(len(path.name) == 64 for path in kept)
    assert sum(path.stat().st_size for path in kept) < 3 << 20


def test_another_machine_opens_a_map_on_s3_with_nothing_but_its_url(
    remote_run, reference, tmp_path, monkeypatch
):
    run = remote_run("plain")
    [folder] = [f for f in fsspec.filesystem("s3").ls(run.output_url) if "/knn-" in f]
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    built = open_map(f"s3://{folder}")
    assert built.manifest["files"]["map"]["sha256"] == reference.contents["map"]
    assert len(built.load().get([0, 1, 2])) == 3
    assert [len(path.name) for path in tmp_path.iterdir()] == [64]


def test_status_of_a_run_on_s3_is_read_from_its_records(remote_run):
    run = remote_run("plain")
    found = run.index("status").result()["folders"]
    assert [(each["kind"], each["finished"]) for each in found] == [
        ("embeddings", True),
        ("index", True),
    ]
    assert all(each["url"].startswith("s3://bucket/") for each in found)
