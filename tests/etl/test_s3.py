"""Storage on an S3 server: the right result or a clear error, whatever the network does."""

import json
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from etl.cache import CACHE_VARIABLE
from etl.compressed import open_source
from etl.deadline import DEADLINE_VARIABLE, DeadlineError
from etl.merge import MergeConfig, merge_dataset
from etl.storage import (
    StageFolder,
    StorageError,
    create_json,
    filesystem_of,
    read_json,
    write_json,
)
from tests.s3_server import FAULTS, Rule, s3_server

CONTENT = bytes(range(256)) * 4000


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as proxy:
        fsspec.filesystem("s3").mkdir("bucket")
        yield proxy


@pytest.fixture
def faults(server, monkeypatch, tmp_path):
    """The proxy, without rules at first; a small deadline and an empty cache."""
    monkeypatch.setenv(DEADLINE_VARIABLE, "4")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    server.rules.clear()
    yield server
    server.rules.clear()


@pytest.fixture
def folder(request):
    return StageFolder(f"s3://bucket/{abs(hash(request.node.name))}")


def stored(folder, tmp_path, content=CONTENT):
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    [found] = folder.store("file", path)
    return found


def attempt(work):
    """What work returns, or the clear error that it raised."""
    started = time.monotonic()
    try:
        found = work()
    except (StorageError, OSError) as error:
        found = error
    assert time.monotonic() - started < 20
    return found


def test_files_and_records_travel(faults, folder, tmp_path):
    file = stored(folder, tmp_path)
    assert folder.fetch(file).read_bytes() == CONTENT
    assert folder.publish("done", {"files": {"f": vars(file)}}) == folder.record("done")
    assert folder.publish("done", {"other": 1}) == folder.record("done")
    write_json(folder.path_of("x.json"), {"a": 1})
    write_json(folder.path_of("x.json"), {"a": 2})
    assert read_json(folder.path_of("x.json")) == {"a": 2}
    with pytest.raises(FileNotFoundError):
        read_json(folder.path_of("absent.json"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_storing_never_leaves_a_file_that_is_taken_for_whole(
    faults, folder, tmp_path, fault
):
    faults.rules.append(Rule(r"^PUT .*file", fault, times=1))
    file = attempt(lambda: stored(folder, tmp_path))
    assert faults.rules[0].hits == 1
    if isinstance(file, Exception):
        assert fault == "silent"
        assert isinstance(file, DeadlineError)
        file = stored(folder, tmp_path)
    assert folder.fetch(file).read_bytes() == CONTENT


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_fetching_gives_the_content_or_an_error(faults, folder, tmp_path, fault):
    file = stored(folder, tmp_path)
    faults.rules.append(Rule(r"^GET .*file", fault, times=1))
    found = attempt(lambda: folder.fetch(file))
    assert faults.rules[0].hits == 1
    if isinstance(found, Exception):
        found = folder.fetch(file)
    assert found.read_bytes() == CONTENT
    assert [p.name for p in Path(found).parent.iterdir()] == [file.sha256]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_publishing_leaves_one_record_in_force(faults, folder, fault):
    faults.rules.append(Rule(r"^PUT .*done", fault, times=1))
    value = attempt(lambda: folder.publish("done", {"by": "first"}))
    assert faults.rules[0].hits == 1
    if isinstance(value, Exception):
        value = folder.publish("done", {"by": "second"})
    assert folder.record("done") == value
    assert not create_json(folder.path_of("done.json"), {"by": "third"})
    assert folder.record("done") == value


@pytest.mark.parametrize(
    ("fault", "times"), [*((fault, 1) for fault in FAULTS), ("cut", 99), ("silent", 99)]
)
def test_an_input_is_read_whole_or_not_at_all(faults, folder, tmp_path, fault, times):
    lines = b"".join(json.dumps({"text": f"{i}" * 50}).encode() + b"\n" for i in range(40_000))
    file = stored(folder, tmp_path, lines)
    faults.rules.append(Rule(r"^GET .*file", fault, times=times))

    def read():
        with open_source(folder.path_of(file.name), None) as source:
            source.seek(17)
            return source.read()

    found = attempt(read)
    assert faults.rules[0].hits >= 1
    if times == 1 and fault != "silent":
        assert found == lines[17:]
    else:
        assert isinstance(found, Exception) or found == lines[17:]


def test_a_silent_server_is_an_error_within_the_deadline_that_says_what_to_do(faults, folder):
    write_json(folder.path_of("x.json"), {})
    faults.rules.append(Rule(r"^GET .*x.json", "silent", times=99))
    started = time.monotonic()
    with pytest.raises(DeadlineError, match=f"x.json: no answer within 4 s.*{DEADLINE_VARIABLE}"):
        read_json(folder.path_of("x.json"))
    assert time.monotonic() - started < 9


def test_unnamed_objects_are_removed_and_only_they(faults, folder, tmp_path):
    file = stored(folder, tmp_path)
    folder.publish("done", {"files": {"f": vars(file)}})
    write_json(folder.path_of("deep/leftover.json"), {})
    other = StageFolder(folder.url + "-other")
    other.publish("done", {})
    assert folder.remove_unnamed({file.name, "done.json"}) == 1
    filesystem, path = filesystem_of(folder.url)
    filesystem.invalidate_cache()
    names = sorted(entry.removeprefix(path + "/") for entry in filesystem.find(path))
    assert names == sorted(["done.json", file.name])
    assert other.record("done") == {}
    with suppress(FileNotFoundError):
        other.remove_unnamed(set())
    assert other.record("done") is None


@pytest.mark.parametrize("fault", ["reset", "lost reply"])
def test_a_large_file_is_stored_though_completing_it_fails_once(faults, folder, tmp_path, fault):
    content = os.urandom(1 << 20) * 101
    faults.rules.append(Rule(r"^POST .*uploadId", fault))
    file = stored(folder, tmp_path, content)
    assert faults.rules[0].hits == 1
    filesystem, path = filesystem_of(folder.path_of(file.name))
    assert filesystem.size(path) == len(content)


@pytest.mark.parametrize("fault", [None, "503", "cut", "lost reply"])
def test_merging_from_and_to_s3_gives_the_pair_through_faults(
    faults, folder, data, tmp_path, fault
):
    url = copied(data.training.url, folder)
    if fault:
        faults.rules.append(Rule(r"^(POST|PUT) .*merged.bin", fault))
        faults.rules.append(Rule(r"^GET .*\.bin", fault))
    config = MergeConfig(url, folder.path_of("merged"))
    result = merge_dataset(config)
    here = merge_dataset(MergeConfig(data.training.url, str(tmp_path / "here")))
    for suffix in ("bin", "idx"):
        assert fsspec.open(result[suffix]).open().read() == Path(here[suffix]).read_bytes()


def test_a_silent_server_leaves_no_half_of_a_merged_pair(faults, folder, data):
    url = copied(data.training.url, folder)
    faults.rules.append(Rule(r"^(POST|PUT) .*merged.bin", "silent", times=99))
    with pytest.raises(DeadlineError, match=DEADLINE_VARIABLE):
        merge_dataset(MergeConfig(url, folder.path_of("merged")))
    faults.rules.clear()
    assert not fsspec.filesystem("s3").glob(folder.path_of("merged*"))


def copied(url, folder):
    """A dataset on S3 with the content of a local one."""
    target = folder.path_of("dataset")
    fsspec.filesystem("s3").put(url, target, recursive=True)
    return target


def test_a_damaged_shard_is_not_merged(faults, folder, data):
    url = copied(data.training.url, folder)
    name = data.training.manifest.shards[0].bin.name
    content = bytearray(Path(data.training.url, name).read_bytes())
    content[3] ^= 1
    fsspec.filesystem("s3").pipe(f"{url}/{name}", bytes(content))
    with pytest.raises(StorageError, match="the object is damaged, prepare"):
        merge_dataset(MergeConfig(url, folder.path_of("merged")))
    assert not fsspec.filesystem("s3").glob(folder.path_of("merged*"))


@pytest.mark.spark
def test_a_preparation_through_faults_is_the_one_without(
    faults, spark, tokenizer_url, tmp_path, monkeypatch
):
    from etl.prepare import PrepareConfig, prepare
    from tests.etl.test_prepare import contents, datasets, make_texts

    monkeypatch.setenv(DEADLINE_VARIABLE, "20")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(200))
    (tmp_path / "in.jsonl").write_text(lines)
    with fsspec.open("s3://bucket/in/in.jsonl", "w") as file:
        file.write(lines)
    for name in os.environ:
        if name.startswith(("AWS_", "RETROMILL_")):
            monkeypatch.setitem(spark.sparkContext.environment, name, os.environ[name])
    here = PrepareConfig(
        input_urls=str(tmp_path / "in.jsonl"),
        output_url=str(tmp_path / "out"),
        tokenizer_url=tokenizer_url,
        splits_string="70,15,15",
        chunk_size=8,
        split_bytes=3000,
    )
    expected = prepare(here, lambda: spark)
    for pattern in ("GET .*in.jsonl", "PUT .*bin", "PUT .*splits", "PUT .*npy", "PUT .*manifest"):
        faults.rules += [Rule(pattern, fault) for fault in ("503", "reset", "lost reply", "cut")]
    faults.rules.append(Rule("PUT .*0001.*bin", "silent"))
    there = replace(here, input_urls="s3://bucket/in", output_url="s3://bucket/out")
    result = prepare(there, lambda: spark)
    assert sum(rule.hits for rule in faults.rules) > 15
    assert result["counts"] == expected["counts"]
    for split, dataset in datasets(result).items():
        assert contents(dataset) == contents(datasets(expected)[split])
        shards = [shard.bin.sha256 for shard in dataset.manifest.shards]
        assert shards == [s.bin.sha256 for s in datasets(expected)[split].manifest.shards]
    assert prepare(there, lambda: spark) == result
