import os
import pickle
import threading
import uuid

import fsspec
import pytest

from etl import cache, storage
from etl.storage import StageFolder, StorageError, StoredFile, create_json, read_json


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path, monkeypatch):
    """A folder that does not exist yet. Copies of remote objects go to the test's own cache."""
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    if request.param == "file":
        return str(tmp_path / "folder")
    return f"memory://{uuid.uuid4().hex}"


def names_in(url):
    filesystem, path = storage.filesystem_of(url)
    return sorted(name.rpartition("/")[2] for name in filesystem.find(path))


def write_file(path, content):
    path.write_bytes(content)
    return path


def overwrite(url, content):
    with fsspec.open(url, "wb") as file:
        file.write(content)


def test_write_atomically_stores_the_whole_object(url):
    storage.write_atomically(f"{url}/a", lambda file: file.write(b"old"))
    storage.write_atomically(f"{url}/a", lambda file: file.write(b"new"))
    assert storage.read_bytes(f"{url}/a") == b"new"
    assert names_in(url) == ["a"]


def test_write_atomically_leaves_nothing_when_the_writer_fails(url):
    def fail(file):
        file.write(b"half")
        file.flush()
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        storage.write_atomically(f"{url}/a", fail)
    assert names_in(url) == []
    storage.write_json(f"{url}/a", {"old": 1})
    with pytest.raises(RuntimeError, match="killed"):
        storage.write_atomically(f"{url}/a", fail)
    assert read_json(f"{url}/a") == {"old": 1}


def test_read_json_says_what_to_do_about_a_broken_file(url):
    storage.write_atomically(f"{url}/a.json", lambda file: file.write(b'{"half":'))
    with pytest.raises(StorageError, match="delete it"):
        read_json(f"{url}/a.json")


def test_create_json_never_overwrites(url):
    assert create_json(f"{url}/record.json", {"attempt": 1})
    assert not create_json(f"{url}/record.json", {"attempt": 2})
    assert read_json(f"{url}/record.json") == {"attempt": 1}
    assert names_in(url) == ["record.json"]


def test_one_thread_wins_the_race_for_a_local_record(tmp_path):
    for i in range(50):
        barrier, won = threading.Barrier(2), {}

        def attempt(me, target=str(tmp_path / f"{i}.json"), barrier=barrier, won=won):
            barrier.wait()
            won[me] = create_json(target, {"writer": me})

        threads = [threading.Thread(target=attempt, args=(me,)) for me in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [me for me, result in won.items() if result]
        assert len(won) == 2
        assert [read_json(str(tmp_path / f"{i}.json"))["writer"]] == winners


def published(url, tmp_path, content=b"content"):
    folder = StageFolder(url)
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    [stored] = folder.store("shard", write_file(scratch / "made.docs.npy", content))
    folder.publish("done", {"files": {"data": storage.asdict(stored)}, "rows": 3})
    return folder, stored


def test_a_stored_file_is_named_by_its_content_and_fetched_as_written(url, tmp_path):
    folder, stored = published(url, tmp_path)
    other, same = published(url, tmp_path, b"another")[1], published(url, tmp_path)[1]
    assert stored == same
    assert stored.name != other.name
    assert stored.name.endswith(".docs.npy")
    assert (stored.bytes, len(stored.sha256)) == (7, 64)
    assert folder.fetch(stored).read_bytes() == b"content"
    assert pickle.loads(pickle.dumps(folder)) == folder


def test_the_first_record_stays_in_force(url, tmp_path):
    folder, _ = published(url, tmp_path)
    assert folder.publish("done", {"rows": 99})["rows"] == 3
    assert folder.record("done")["rows"] == 3
    assert folder.record("absent") is None


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_record_whose_file_is_damaged_is_withdrawn(url, tmp_path, damage):
    folder, stored = published(url, tmp_path)
    target = folder.path_of(stored.name)
    if damage == "missing":
        filesystem, path = storage.filesystem_of(target)
        filesystem.rm_file(path)
    else:
        overwrite(target, b"cont")
    with pytest.raises(StorageError, match="its record says"):
        folder.check_size(stored)
    assert folder.record("done") is None
    assert "done.json" not in names_in(url)


def test_a_record_that_is_half_written_is_withdrawn(url, tmp_path):
    folder, _ = published(url, tmp_path)
    overwrite(folder.path_of("done.json"), b'{"files"')
    assert folder.record("done") is None
    assert folder.publish("done", {"rows": 5})["rows"] == 5


def test_fetch_refuses_a_file_of_another_size(url, tmp_path):
    folder, stored = published(url, tmp_path)
    overwrite(folder.path_of(stored.name), b"longer than it was")
    with pytest.raises(StorageError, match=r"18 bytes|sha256"):
        folder.fetch(stored)


def test_fetch_refuses_a_remote_object_with_a_flipped_byte(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    folder, stored = published(f"memory://{uuid.uuid4().hex}", tmp_path)
    overwrite(folder.path_of(stored.name), b"Content")
    with pytest.raises(StorageError, match="damaged"):
        folder.fetch(stored)
    assert list((tmp_path / "cache").iterdir()) == []


def test_fetch_makes_one_copy_of_equal_content(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    folder, stored = published(f"memory://{uuid.uuid4().hex}", tmp_path)
    first = folder.fetch(stored)
    filesystem, path = storage.filesystem_of(folder.path_of(stored.name))
    filesystem.rm_file(path)
    assert folder.fetch(stored) == first
    assert [copy.name for copy in (tmp_path / "cache").iterdir()] == [stored.sha256]


def test_the_cache_keeps_its_bound_by_dropping_what_was_used_longest_ago(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv(cache.CACHE_BYTES_VARIABLE, "25")
    url = f"memory://{uuid.uuid4().hex}"
    files = [published(url, tmp_path, bytes([i]) * 10)[1] for i in range(3)]
    folder = StageFolder(url)
    for age, file in ((3000, files[0]), (2000, files[1]), (1000, files[2])):
        path = folder.fetch(file)
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    kept = {copy.name for copy in (tmp_path / "cache").iterdir()}
    assert kept == {files[1].sha256, files[2].sha256}


def test_scratch_of_killed_writers_is_removed_and_nothing_else(tmp_path):
    folder, stored = published(str(tmp_path / "folder"), tmp_path)
    leftover = tmp_path / "folder" / "shards" / ".scratch-1"
    leftover.mkdir(parents=True)
    (leftover / "half").write_bytes(b"x")
    (tmp_path / "folder" / ".scratch-2").write_bytes(b"x")
    folder.remove_scratch()
    assert names_in(folder.url) == sorted(["done.json", stored.name])


def test_scratch_of_a_living_writer_stays(tmp_path):
    folder, stored = published(str(tmp_path / "folder"), tmp_path)
    with storage.scratch_folder(folder.path_of("shards")) as scratch:
        (scratch / "half").write_bytes(b"x")
        assert folder.remove_unnamed({stored.name, "done.json"}) == 0
        assert (scratch / "half").read_bytes() == b"x"
    assert names_in(folder.url) == sorted(["done.json", stored.name])


def test_records_are_those_that_can_be_trusted(url, tmp_path):
    folder, _ = published(url, tmp_path)
    [other] = folder.store("other", write_file(tmp_path / "o.bin", b"other"))
    folder.publish("deep/cut", {"files": {"data": storage.asdict(other)}})
    folder.publish("deep/good", {"rows": 1})
    overwrite(folder.path_of(other.name), b"oth")
    found = folder.records(["done", "absent", "deep/cut", "deep/good"])
    assert found == {"done": folder.record("done"), "deep/good": {"rows": 1}}
    assert "cut.json" not in names_in(url)


def test_content_key_changes_with_any_part():
    file = StoredFile("a", 1, "0")
    keys = {
        storage.content_key(*parts)
        for parts in ((1,), ("1",), (1, 2), ([1, 2],), (file,), (StoredFile("a", 2, "0"),))
    }
    assert len(keys) == 6
    assert storage.content_key({"a": 1, "b": 2}) == storage.content_key({"b": 2, "a": 1})
    with pytest.raises(TypeError, match="object"):
        storage.content_key(object())
