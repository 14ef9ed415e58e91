"""The cache of remote objects when several processes use it."""

import multiprocessing
import os
import time

import pytest

from etl import cache
from etl.cache import cached_copy

NAME = "a" * 64


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def slow_download(path):
    with open(os.environ["DOWNLOADS"], "a") as log:
        log.write("x")
    time.sleep(0.5)
    path.write_bytes(b"content")


def fetch(barrier):
    barrier.wait()
    assert cached_copy(NAME, 7, slow_download).read_bytes() == b"content"


def test_processes_that_want_the_same_object_download_it_once(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DOWNLOADS", str(tmp_path / "downloads"))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=fetch, args=(barrier,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "downloads").read_text() == "x"
    assert [path.name for path in folder.iterdir()] == [NAME]


def test_a_copy_that_was_just_asked_for_is_not_evicted_before_it_is_opened(folder, monkeypatch):
    monkeypatch.setenv(cache.CACHE_BYTES_VARIABLE, "10")
    first = cached_copy("1" * 64, 8, lambda path: path.write_bytes(b"x" * 8))
    cached_copy("2" * 64, 8, lambda path: path.write_bytes(b"y" * 8))
    assert first.read_bytes() == b"x" * 8
    os.utime(first, (0, 0))
    cached_copy("3" * 64, 8, lambda path: path.write_bytes(b"z" * 8))
    assert not first.exists()


def test_remains_of_killed_downloads_go_after_a_day(folder):
    folder.mkdir()
    for name, age in ((".scratch-old", 2 * 86400), (".scratch-new", 10)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    cached_copy(NAME, 1, lambda path: path.write_bytes(b"x"))
    assert sorted(path.name for path in folder.iterdir()) == [".scratch-new", NAME]
