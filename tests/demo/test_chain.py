"""The demo as a user starts it on a small corpus, killed on its way."""

import hashlib
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import faiss
import httpx
import orjson
import pytest

from etl.dataset import Dataset
from indexing.knn_manifest import open_map
from tests.texts import write_corpus

pytestmark = [pytest.mark.spark, pytest.mark.dask, pytest.mark.dist, pytest.mark.slow]
BAD = [b'{"text": "broken', b'{"other": 1}', b'{"text": ""}', b'{"text": 5}']
MARK = "RETROMILL_TEST_RUN"
DATA_FOLDERS = ("data", "index", "knn")
DATA_STAGES = ("prepare", "index", "knn-train", "knn-validation", "knn-test")
KILLED_WHEN = {"index": "index/index-*/trained.json", "train-retro": "retro/metrics.jsonl"}
"""Stages, and the first trace of the work in their middle."""


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
    """Digest of every file of datasets, index and KNN maps; reports of performance are no data."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in DATA_FOLDERS
        for path in sorted((folder / part).rglob("*"))
        if path.is_file() and path.parent.name != "reports"
    }


def result_of(folder, stage):
    return json.loads((folder / "stages" / f"{stage}.json").read_text())


def kill_in(stage, process, folder):
    """Kills the whole process group in the middle of a stage; waits until nothing of it is left.
    Returns whether the stage was unfinished."""
    while not any(folder.glob(KILLED_WHEN[stage])):
        assert process.poll() is None, (folder / "log").read_text()[-4000:]
        time.sleep(0.05)
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
def killed(corpus, tmp_path_factory):
    """Folder and report of a demo that was killed twice and started again."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    unfinished = [kill_in(stage, start(folder, corpus), folder) for stage in KILLED_WHEN]
    assert any(unfinished), "stages were over before they were killed"
    return folder, finish(start(folder, corpus), folder)


def run_again(command, patch):
    """A printed command, in this process."""
    _, _, module, *arguments = shlex.split(command)
    patch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 0


@pytest.mark.timeout(1200)
def test_killed_in_its_stages_it_made_the_files_of_undisturbed_jobs(killed, spark, monkeypatch):
    folder, _ = killed
    found = contents(folder)
    for part in DATA_FOLDERS:
        (folder / part).rename(folder / f"{part}.killed")
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # as in a worker
    for stage in DATA_STAGES:
        here = "" if stage == "prepare" else " --cluster.kind=none"
        run_again(result_of(folder, stage)["command"] + here, monkeypatch)
    faiss.omp_set_num_threads(threads)
    assert contents(folder) == found


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


def test_its_model_is_served_with_its_index_and_live_documents(killed):
    folder, _ = killed
    command = [sys.executable, "-m", "jobs.serve", "--config", str(folder / "serve.yaml")]
    with (
        open(folder / "serve.log", "wb") as log,
        subprocess.Popen([*command, "--port=0"], stdout=subprocess.PIPE, stderr=log) as server,
    ):
        assert server.stdout is not None
        try:
            url = json.loads(server.stdout.readline())["url"]
            assert httpx.get(f"{url}/ui/", timeout=60).status_code == 200
            fact = "The lighthouse of Quaelbo was founded by Tessa."
            added = httpx.post(f"{url}/v1/documents", json={"documents": [{"text": fact}]})
            assert added.status_code == 200, added.text
            asked = {"prompt": fact, "max_tokens": 4, "neighbors": 2, "pad_tokens": True}
            answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()
            found = [n for r in answer["choices"][0]["retrieved"] for n in r["neighbors"]]
            assert {n["service"] for n in found} == {"static", "dynamic"}
            assert any("Quaelbo" in n["text"] for n in found)
        finally:
            server.terminate()
            assert server.wait(60) == 0
