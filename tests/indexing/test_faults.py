"""Whole jobs under faults. Whatever is killed at whatever stage, however many workers and shards:
the same index and map, byte for byte. Bad input: a message, nothing lost, and the next run
succeeds."""

import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest

from etl.cache import CACHE_VARIABLE
from etl.storage import StageFolder, StoredFile, read_json
from indexing.cluster import ClusterConfig, open_runner
from indexing.knn_manifest import open_map
from jobs import build_index, build_knn_map
from jobs.build_index import BuildIndexConfig
from jobs.build_knn_map import BuildKNNMapConfig
from tests.indexing.job_runs import EMBEDDER, INDEX_OPTIONS, OPTIONS, contents
from tests.s3_server import Rule
from tests.small_data import prepare_plainly

pytestmark = [pytest.mark.dask, pytest.mark.slow]

# What each stage stores: the request at which its process is killed.
INDEX_STAGES = {
    "embed": r"/embeddings-\w+/blocks/000001-",
    "train": r"/index-\w+/trained-",
    "add": r"/index-\w+/shards/00001-of-00003-",
    "merge": r"/index-\w+/index-",
    "tune": r"/index-\w+/index\.json",
}
MAP_STAGES = {
    "embed": r"/embeddings-\w+/blocks/000001-",
    "search": r"/knn-\w+/shards/00001-of-00003-",
    "merge": r"/knn-\w+/knn_map-",
}
COMMITS = (r"/embeddings-\w+/embeddings\.json", r"/knn-\w+/knn\.json")


def wait_for(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.002)
    return found


@pytest.fixture
def stalled(s3):
    """Makes a PUT under a name hang: stalled(run, pattern) is the rule, whose hits tell when."""

    def stall(run, pattern):
        bucket = run.output_url.removeprefix("s3:/")
        s3.rules.append(Rule(f"PUT {bucket}{pattern}", "silent"))
        return s3.rules[-1]

    yield stall
    s3.rules.clear()


@pytest.fixture
def uploads(s3, monkeypatch):
    """How often each object was sent."""
    sent, fault_for = Counter(), s3.fault_for

    def note(request):
        method, _, path = request.partition(" ")
        if method == "PUT":
            sent[path.partition("?")[0]] += 1
        return fault_for(request)

    monkeypatch.setattr(s3, "fault_for", note)
    return sent


def kill_at(rule, job):
    """kill -9 of the whole job when it is at the request."""
    wait_for(lambda: rule.hits or job.ended, f"request {rule.pattern}")
    assert rule.hits, job.stderr
    os.killpg(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL, job.stderr


def test_a_job_killed_at_every_stage_goes_on_where_it_was(remote_run, reference, stalled, uploads):
    run = remote_run("killed")
    points = list(INDEX_STAGES.values())
    for pattern in (points[0], COMMITS[0], *points[1:]):
        kill_at(stalled(run, pattern), run.index(total_shards=3))
    index_url = run.index(total_shards=3).result()["index_url"]
    for pattern in (*MAP_STAGES.values(), COMMITS[1]):
        kill_at(stalled(run, pattern), run.map(index_url, total_shards=3))
    map_url = run.map(index_url, total_shards=3).result()["map_url"]
    assert contents(index_url, map_url) == reference.contents
    killed = (*points, *MAP_STAGES.values(), *COMMITS)
    repeated = {p for p, times in uploads.items() if times > 1 and not p.endswith("/plan.json")}
    assert repeated
    assert not [path for path in repeated if not any(re.search(point, path) for point in killed)]


def finish_on(runner, run, between=lambda stages: nullcontext(), total_shards=3):
    """Both jobs in this process on the workers of a running cluster; the bytes of what they
    made."""
    shared = {
        "stage": "all",
        "output_url": run.output_url,
        "embedder": EMBEDDER,
        "block_chunks": OPTIONS["block_chunks"],
        "total_shards": total_shards,
        "cluster": ClusterConfig(scheduler_address=runner.client.scheduler.address),
    }
    with between(INDEX_STAGES):
        index = BuildIndexConfig(dataset_url=run.retrieval_url, **shared, **INDEX_OPTIONS)
        index_url = build_index.run(index)["index_url"]
    with between(MAP_STAGES):
        knn = BuildKNNMapConfig(
            dataset_url=run.training_url,
            retrieval_url=run.retrieval_url,
            index_url=index_url,
            **shared,
        )
        return contents(index_url, build_knn_map.run(knn)["map_url"])


def kill_workers(client, rules):
    """For every stage in turn: kill -9 of the worker that hangs in its request."""
    for stage, rule in rules:
        wait_for(lambda rule=rule: rule.hits, f"request of {stage}")

        def alone():
            busy = {worker: keys for worker, keys in client.processing().items() if keys}
            return list(busy) if sum(map(len, busy.values())) == 1 else None

        worker = wait_for(alone, f"single task of {stage}")
        os.kill(client.run(os.getpid, workers=worker)[worker[0]], signal.SIGKILL)


@contextmanager
def workers_killed(client, run, stages, stalled):
    rules = [(stage, stalled(run, pattern)) for stage, pattern in stages.items()]
    killer = threading.Thread(target=kill_workers, args=(client, rules))
    killer.start()
    yield
    killer.join(60)
    assert all(rule.hits for _, rule in rules)


def test_workers_killed_at_every_stage_change_nothing(remote_run, reference, runner, stalled):
    run, client = remote_run("workers"), runner.client
    before = len(client.get_events("all"))
    killing = lambda stages: workers_killed(client, run, stages, stalled)
    assert finish_on(runner, run, killing) == reference.contents
    since = [event for _, event in client.get_events("all")[before:]]
    died = [e for e in since if e["action"] == "remove-worker" and not e["expected"]]
    assert len(died) >= len(INDEX_STAGES) + len(MAP_STAGES)


def test_local_workers_die_with_their_job_which_goes_on_with_other_workers_and_shards(
    local_run, reference
):
    job = local_run.index(**{"cluster.kind": "local", "cluster.num_workers": 2})
    blocks = lambda: list(Path(local_run.output_url).glob("embeddings-*/blocks/*.json"))
    wait_for(lambda: blocks() or job.ended, "block of embeddings", 200)
    workers = psutil.Process(job.pid).children(recursive=True)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL, job.stderr
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=30)[1]
    kept = {path: path.stat().st_mtime_ns for path in blocks()}
    with open_runner(ClusterConfig(num_workers=4)) as four:
        assert finish_on(four, local_run, total_shards=5) == reference.contents
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(Path(local_run.output_url).rglob(".scratch-*"))


@pytest.mark.parametrize("total_shards", [2, 29])
def test_any_number_of_shards_gives_the_same_bytes(local_run, reference, total_shards):
    assert local_run.finish(total_shards=total_shards) == reference.contents


def refused(job, *messages, code=2):
    """Asserts that the job ended with a message; what it said."""
    assert job.wait() == code, job.stderr
    for message in messages:
        assert re.search(message, job.stderr), job.stderr
    return job.stderr


@pytest.fixture
def another_training(tmp_path, tokenizer_folder):
    """The same documents by another tokenizer."""
    path = tmp_path / "tokenizer.json"
    text = (tokenizer_folder / "tokenizer.json").read_text()
    path.write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true'))
    assert path.read_text() != text
    return prepare_plainly(tmp_path, str(path))[0]


def test_inputs_that_do_not_fit_together_are_refused(
    local_run, reference, corpus, another_training
):
    index_url = reference.index_url
    refused(
        local_run.map(index_url, **{"embedder.batch_size": 3}),
        r"was built with embedder .*\(\w{32}\).*would be embedded with .*\(\w{32}\); use the same",
    )
    refused(
        replace(local_run, training_url=another_training.url).map(index_url),
        r"has tokenizer (\w+), \S+ has \w+; expected the same: prepare both with one tokenizer",
    )
    refused(
        local_run.map(index_url, K_neighbors=5000),
        r"K_neighbors \+ spare_neighbors is 5006, but .* holds only \d+ vectors; ask for fewer",
    )
    refused(
        replace(local_run, retrieval_url=corpus.training.url).index(),
        "is the train dataset; only a retrieval dataset is indexed",
    )
    refused(local_run.map(local_run.output_url), "expected the folder that jobs.build_index prints")
    assert not Path(local_run.output_url).exists()


def test_an_unreachable_scheduler_is_named_and_nothing_is_begun(local_run):
    there = {"cluster.kind": "local", "cluster.scheduler_address": "tcp://127.0.0.1:9"}
    refused(
        local_run.index(environment={"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "1s"}, **there),
        r"no Dask scheduler answered at tcp://127\.0\.0\.1:9 within 1 s",
        code=1,
    )
    assert not Path(local_run.output_url).exists()


def blocks_of(run):
    [folder] = Path(run.output_url).glob("embeddings-*")
    return folder, sorted(folder.glob("blocks/*.npy"))


def test_a_block_with_nan_is_refused_and_embedding_again_heals_it(local_run, reference):
    local_run.index("embed").result()
    folder, blocks = blocks_of(local_run)
    vectors = np.load(blocks[1])
    vectors[5, 7] = np.nan
    np.save(blocks[1], vectors)
    said = refused(
        local_run.index(), r"vectors .* are not all finite; delete that folder and embed"
    )
    assert str(folder) in said
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert local_run.finish() == reference.contents


def test_vectors_of_zeros_are_in_no_index_and_have_no_neighbors(local_run, reference):
    local_run.index("embed").result()
    _, blocks = blocks_of(local_run)
    vectors = np.load(blocks[1])
    with_text = vectors.any(axis=1).sum()
    np.save(blocks[1], np.zeros_like(vectors))
    index = local_run.index().result()
    whole = read_json(f"{reference.index_url}/index.json")["vectors"]
    assert index["vectors"] == whole - with_text
    found = open_map(local_run.map(index["index_url"]).result()["map_url"])
    zeros = np.arange(len(vectors)) + len(np.load(blocks[0]))
    rows = found.load().get(np.arange(found.manifest["rows"]))
    assert (rows[zeros] == -1).all()
    assert not np.isin(rows, zeros).any()
    for block in blocks:
        np.save(block, np.zeros_like(np.load(block)))
    refused(local_run.index(seed=1), r"only 0 vectors to train on")
    refused(local_run.index(faiss_factory="Flat"), r"no vectors")


def shard(run, number, of=3):
    """The folder of an index, and the file of one of its shards."""
    filesystem, root = fsspec.url_to_fs(run.output_url)
    [path] = filesystem.glob(f"{root}/index-*/shards/{number:05d}-of-{of:05d}.json")
    url = path if path.startswith("/") else filesystem.unstrip_protocol(path)
    folder = StageFolder(url.rpartition("/shards/")[0])
    return folder, StoredFile(**read_json(url)["files"]["index"])


def test_missing_truncated_and_swapped_shards_are_not_merged(local_run, reference):
    stages = {"total_shards": 3}
    for stage in ("embed", "train"):
        local_run.index(stage, **stages).result()
    refused(local_run.index("merge", **stages), r"3 of 3 records are missing: .*; add these")
    local_run.index("add", **stages).result()
    folder, first = shard(local_run, 0)
    os.truncate(folder.path_of(first.name), 1000)
    said = refused(
        local_run.index("merge", **stages), "1 of 3 records are missing: shards/00000-of-00003"
    )
    assert f"1000 bytes, its record says {first.bytes}" in said
    local_run.index("add", shard_id=0, **stages).result()
    records = [folder.path_of(f"shards/0000{i}-of-00003.json") for i in range(3)]
    right = Path(records[2]).read_text()
    Path(records[2]).write_text(Path(records[1]).read_text())
    refused(local_run.index("merge", **stages), r"00002-of-00003.json holds chunks", "delete it")
    Path(records[2]).write_text(right)
    assert local_run.finish(**stages) == reference.contents


def test_a_shard_changed_on_s3_is_not_merged(remote_run, reference, tmp_path):
    run, stages = remote_run("changed"), {"total_shards": 3}
    for stage in ("embed", "train", "add"):
        run.index(stage, **stages).result()
    folder, file = shard(run, 1)
    s3 = fsspec.filesystem("s3")
    path = folder.path_of(file.name)
    right = s3.cat_file(path)
    s3.pipe_file(path, right[:-5] + b"\xff" + right[-4:])
    elsewhere = {CACHE_VARIABLE: str(tmp_path / "cache")}
    merge = run.index("merge", environment=elsewhere, **stages)
    refused(merge, rf"{file.name}: sha256 \w+, its record says {file.sha256}")
    s3.rm_file(path)
    assert run.finish(**stages) == reference.contents


@pytest.fixture
def disk(tmp_path):
    """A file system of its own for the run: disk(num_bytes) mounts it or changes its size."""
    folder, mounted = tmp_path / "run", []
    folder.mkdir()

    def resize(num_bytes):
        options = f"size={num_bytes}" + (",remount" if mounted else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(num_bytes)

    yield resize
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def grow_until_done(start, resize, sizes):
    """Runs a job again and again with more room; its result and the stages that had too little."""
    too_small = []
    for size in sizes:
        resize(size)
        job = start()
        if job.wait() == 0:
            return job.result(), too_small
        said = refused(job, "No space left on device", code=1)
        too_small += re.findall(r"error: (\w+): \d+ of \d+ tasks failed", said)
    raise AssertionError(f"{too_small} failed")


def test_a_full_disk_is_named_at_every_stage_and_more_room_is_enough(local_run, reference, disk):
    kib = 1 << 10
    index, failed = grow_until_done(local_run.index, disk, range(150 * kib, 4000 * kib, 80 * kib))
    assert {"embed", "add", "merge"} <= set(failed)
    used = psutil.disk_usage(local_run.output_url).used
    start = lambda: local_run.map(index["index_url"])
    sizes = range(used + 48 * kib, used + 4000 * kib, 24 * kib)
    found, failed = grow_until_done(start, disk, sizes)
    assert {"search", "merge"} <= set(failed)
    assert contents(index["index_url"], found["map_url"]) == reference.contents
    assert not list(Path(local_run.output_url).rglob(".scratch-*"))


@pytest.mark.parametrize(("file_bytes", "stage"), [(50_000, "embed"), (120_000, "add")])
def test_a_file_that_may_not_grow_is_an_error(local_run, file_bytes, stage):
    job = local_run.index(file_bytes=file_bytes)
    refused(job, rf"{stage}: \d of \d tasks failed; task 0: .*File too large", code=1)
