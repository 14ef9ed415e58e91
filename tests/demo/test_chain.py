"""The demo as a user starts it on a small corpus: whole, or killed in every stage."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from etl.dataset import Dataset
from indexing.knn_manifest import open_map
from tests.texts import write_corpus

pytestmark = [pytest.mark.spark, pytest.mark.dask, pytest.mark.dist, pytest.mark.slow]
BAD = [b'{"text": "broken', b'{"other": 1}', b'{"text": ""}', b'{"text": 5}']
MARK = "RETROMILL_TEST_RUN"
STAGES = (
    *("prepare", "index", "knn-train", "train-plain", "train-retro", "evaluate-retro-facts"),
    "generate",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Words, lines that cannot be used, and a document of emoji."""
    path = tmp_path_factory.mktemp("own") / "own.jsonl"
    write_corpus(path)
    good = path.read_bytes().splitlines()
    texts = [orjson.loads(line)["text"] for line in good]
    more = [orjson.dumps({"text": f"{i} " + texts[i % 40] * 4}) for i in range(400)]
    emoji = orjson.dumps({"text": "🙂🚀" * 300})
    path.write_bytes(b"\n".join([*good, *BAD, *more, emoji]) + b"\n")
    return path


def start(folder, corpus):
    folder.mkdir(exist_ok=True)
    plan = {"chunks_per_s": 100.0, "text_bytes": 1 << 20, "places": 100}
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "jobs.demo", f"--output_url={folder}"]
    command += [f"--input_url={corpus}", "--train_minutes=0.2"]
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env=os.environ | {MARK: str(folder)},
        )


def finish(process, folder):
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, (folder / "log").read_text()[-4000:]
    return json.loads(output.splitlines()[-1])


def contents(folder):
    """Digest of every file of datasets, index and KNN maps."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in ("data", "index", "knn")
        for path in sorted((folder / part).rglob("*"))
        if path.is_file()
    }


def result_of(folder, stage):
    return folder / "stages" / f"{stage}.json"


def kill_in(stage, seconds, process, folder):
    """Kills the whole process group some seconds after the stage began; waits until nothing of it
    is left. Returns whether the stage was unfinished."""
    log = folder / "log"
    while f"== {stage}\n" not in log.read_text():
        assert process.poll() is None, log.read_text()[-4000:]
        time.sleep(0.2)
    time.sleep(seconds)
    assert process.poll() is None, f"{stage} was over before it was killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while running(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not running(folder)
    return not result_of(folder, stage).exists()


def running(folder):
    """Processes of the run, whatever session or group they are in."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if os.fsencode(f"{MARK}={folder}") in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    report = finish(start(folder, corpus), folder)
    return folder, report, contents(folder)


def test_report_says_what_happened(whole, corpus):
    folder, report, _ = whole
    assert json.loads((folder / "report.json").read_text()) == report
    assert report["eval"]["text"]["off"] == report["eval"]["text"]["baseline"]
    assert report["eval"]["facts"]["off"] == report["eval"]["facts"]["baseline"]
    assert sum(report["corpus"]["skipped"].values()) >= len(BAD)
    assert report["index"]["recall_at_k"] > 0.9
    assert report["train"]["steps"] > 0
    page = (folder / "report.html").read_text()
    assert all(sentence in page for sentence in report["says"].values())


def test_what_it_built_passes_the_format_checks(whole):
    folder, report, _ = whole
    prepared = json.loads(result_of(folder, "prepare").read_text())
    datasets = {name: Dataset(found["url"]) for name, found in prepared["datasets"].items()}
    assert set(datasets) == {"train", "validation", "test", "retrieval"}
    for split in ("train", "validation", "test"):
        url = json.loads(result_of(folder, f"knn-{split}").read_text())["map_url"]
        built = open_map(url)
        built.check_parents(datasets[split], datasets["retrieval"])
        rows = built.load().get(range(datasets[split].num_chunks))
        assert rows.shape == (datasets[split].num_chunks, report["knn"]["K"])
        assert rows.max() < datasets["retrieval"].num_chunks
        assert rows.min() >= -1


@pytest.mark.timeout(1200)
def test_killed_in_every_stage_it_ends_with_the_same_files(whole, corpus):
    folder, report, expected = whole
    took = {stage: json.loads(result_of(folder, stage).read_text())["seconds"] for stage in STAGES}
    shutil.rmtree(folder)
    unfinished = [
        kill_in(stage, took[stage] / 2, start(folder, corpus), folder) for stage in STAGES
    ]
    assert sum(unfinished) >= len(STAGES) - 1, "stages were over before they were killed"
    again = finish(start(folder, corpus), folder)
    assert contents(folder) == expected
    assert again["corpus"] == report["corpus"]
    assert again["index"] == report["index"]
