"""The demo as a user starts it on a small corpus, killed on its way."""

import hashlib
import json
import os
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
DATA_STAGES = ("prepare", "index", "knn-train")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Words, lines that cannot be used, and a document of emoji."""
    path = tmp_path_factory.mktemp("own") / "own.jsonl"
    write_corpus(path)
    good = path.read_bytes().splitlines()
    texts = [orjson.loads(line)["text"] for line in good]
    more = [orjson.dumps({"text": f"{i} " + texts[i % 40] * 4}) for i in range(120)]
    emoji = orjson.dumps({"text": "🙂🚀" * 300})
    path.write_bytes(b"\n".join([*good, *BAD, *more, emoji]) + b"\n")
    return path


def start(folder, corpus):
    folder.mkdir(exist_ok=True)
    plan = {"chunks_per_s": 100.0, "text_bytes": 1 << 20, "places": 20}
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
    return json.loads((folder / "stages" / f"{stage}.json").read_text())


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
    return not (folder / "stages" / f"{stage}.json").exists()


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
def expected(corpus, tmp_path_factory):
    """Files of a run that nothing disturbed until its data were complete, and seconds of stages."""
    folder = tmp_path_factory.mktemp("undisturbed") / "demo"
    kill_in("train-plain", 0, start(folder, corpus), folder)
    return contents(folder), {stage: result_of(folder, stage)["seconds"] for stage in DATA_STAGES}


@pytest.fixture(scope="module")
def killed(corpus, expected, tmp_path_factory):
    """Folder and report of a run that was killed four times and started again."""
    folder = tmp_path_factory.mktemp("killed") / "demo"
    moments = {stage: seconds / 2 for stage, seconds in expected[1].items()} | {"train-retro": 8}
    unfinished = [
        kill_in(stage, seconds, start(folder, corpus), folder) for stage, seconds in moments.items()
    ]
    assert sum(unfinished) >= len(moments) - 1, "stages were over before they were killed"
    return folder, finish(start(folder, corpus), folder)


@pytest.mark.timeout(1200)
def test_killed_in_its_stages_it_ends_with_the_same_files(killed, expected):
    assert contents(killed[0]) == expected[0]


def test_report_says_what_happened(killed):
    folder, report = killed
    assert json.loads((folder / "report.json").read_text()) == report
    assert report["eval"]["text"]["off"] == report["eval"]["text"]["baseline"]
    assert report["eval"]["facts"]["off"] == report["eval"]["facts"]["baseline"]
    assert sum(report["corpus"]["skipped"].values()) >= len(BAD)
    assert report["index"]["recall_at_k"] > 0.9
    assert report["train"]["steps"] > 0
    page = (folder / "report.html").read_text()
    assert all(sentence in page for sentence in report["says"].values())


def test_what_it_built_passes_the_format_checks(killed):
    folder, report = killed
    found = result_of(folder, "prepare")["datasets"]
    datasets = {name: Dataset(dataset["url"]) for name, dataset in found.items()}
    assert set(datasets) == {"train", "validation", "test", "retrieval"}
    for split in ("train", "validation", "test"):
        built = open_map(result_of(folder, f"knn-{split}")["map_url"])
        built.check_parents(datasets[split], datasets["retrieval"])
        rows = built.load().get(range(datasets[split].num_chunks))
        assert rows.shape == (datasets[split].num_chunks, report["knn"]["K"])
        assert rows.max() < datasets["retrieval"].num_chunks
        assert rows.min() >= -1
