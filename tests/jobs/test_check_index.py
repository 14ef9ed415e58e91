import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dask
import numpy as np
import pytest

from etl.storage import read_json
from jobs import check_index
from jobs.check_index import CheckIndexConfig
from jobs.command_line import run_job
from tests.indexing.judged_index import SCRIPT, K, plant, script_chunk
from tests.small_data import write_map


@pytest.fixture(scope="module")
def planted(tokenizer_url, tmp_path_factory):
    return plant(tmp_path_factory.mktemp("planted"), tokenizer_url)


def arguments(planted, output, **options):
    data, index = planted
    given = {
        "index_url": index.url,
        "retrieval_url": data.retrieval.url,
        "output_url": str(output),
        "dataset_url": data.training.url,
        "map_url": data.map.url,
        "measure.neighbors": K,
        **options,
    }
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def run(capsys, args):
    with pytest.raises(SystemExit) as ended:
        run_job("Judge.", CheckIndexConfig, check_index.run, args)
    return ended.value.code, *capsys.readouterr()


def checked(capsys, args):
    code, out, err = run(capsys, args)
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def finished(planted, tmp_path_factory):
    """The folder of a finished check."""
    output = tmp_path_factory.mktemp("finished")
    with pytest.raises(SystemExit) as ended:
        run_job("Judge.", CheckIndexConfig, check_index.run, arguments(planted, output))
    assert ended.value.code == 0
    [folder] = output.iterdir()
    return folder


def refuses(monkeypatch):
    """From here on nothing may be measured."""

    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr("indexing.quality.measure", fail)
    monkeypatch.setattr("jobs.check_index.scan_map", fail)


def test_the_report_has_what_was_planted(planted, finished):
    data, report = planted[0], read_json(f"{finished}/report.json")
    neighbors = data.map.load().neighbors
    hub = report["hubness"]["top"][0]
    assert hub["chunk"] == script_chunk(data.retrieval)
    assert hub["times"] == (neighbors == hub["chunk"]).sum()
    assert report["norms"]["not_unit"] == 2
    assert report["chunks"]["equal"]["vectors"]["chunks"] == 2
    assert report["leaks"]["total"] == 0
    assert report["leaks"]["neighbors"] == (neighbors >= 0).sum()
    assert (report["inputs"]["factory"], report["inputs"]["vectors"]) == (
        "Flat",
        planted[1].manifest["vectors"],
    )


def test_markup_in_a_document_is_text_in_the_page(finished):
    report, page = read_json(f"{finished}/report.json"), (finished / "report.html").read_text()
    text = report["hubness"]["top"][0]["text"]
    assert text.startswith(SCRIPT[:16])
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    for title in ("Recall", "Scores", "Hubs", "Where neighbors come from", "Leaks"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("data:image/svg+xml;base64,") == 4


def test_a_finished_check_does_nothing_again(planted, finished, capsys, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    refuses(monkeypatch)
    found = checked(capsys, arguments(planted, finished.parent))
    assert found["report_url"] == str(finished)
    assert found["not_unit"] == 2
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before


def test_a_report_without_its_page_is_made_again(planted, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / finished.name)
    page = tmp_path / finished.name / "report.html"
    expected = page.read_text()
    page.unlink()
    checked(capsys, arguments(planted, tmp_path))
    assert page.read_text() == expected
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report.json"]


def test_another_option_is_another_folder(planted, finished, capsys):
    args = arguments(planted, finished.parent, **{"measure.queries": 30})
    found = checked(capsys, args)
    assert Path(found["report_url"]).parent == finished.parent
    assert Path(found["report_url"]) != finished
    assert found["recall"]["queries"] <= 30
    shutil.rmtree(found["report_url"])


def test_an_index_alone_is_judged(planted, tmp_path, capsys):
    with dask.config.set(scheduler="dask.distributed"):  # what a client leaves behind
        found = checked(capsys, arguments(planted, tmp_path, dataset_url=None, map_url=None))
    assert found["leaks"] is None
    assert found["recall"]["recall_at_k"] == 1
    assert "<h2>Leaks</h2>" not in Path(found["report_url"], "report.html").read_text()


def test_a_map_that_leaks_gets_its_report_and_then_fails(planted, tmp_path, capsys, monkeypatch):
    data = planted[0]
    neighbors = np.array(data.map.load().neighbors)
    own = data.retrieval.chunk_to_doc(np.arange(data.retrieval.num_chunks)) == 0
    neighbors[0, 0] = np.flatnonzero(own)[1]
    built = write_map(tmp_path, data.training, data.retrieval, neighbors)
    args = arguments(planted, tmp_path / "checks", map_url=built.url)
    messages = []
    for _ in range(2):
        code, out, err = run(capsys, args)
        assert (code, out) == (2, "")
        messages.append(err.splitlines()[-1])
        refuses(monkeypatch)
    assert messages[0] == messages[1]
    assert "1 leaks" in messages[0]
    assert "own_document: 1, the first is neighbor 1" in messages[0]
    [folder] = (tmp_path / "checks").iterdir()
    report = read_json(f"{folder}/report.json")
    assert report["leaks"]["counts"]["own_document"] == report["leaks"]["total"] == 1
    assert report["findings"][0].startswith("The map leaks: 1 neighbors")
    assert "own document" in (folder / "report.html").read_text()


@pytest.mark.parametrize("name", ["index", "embeddings", "map"])
def test_damaged_input_is_refused(planted, tmp_path, capsys, name):
    root = Path(planted[1].url).parent
    shutil.copytree(root, tmp_path / "copy")
    patterns = {"index": "index/index-*", "embeddings": "embeddings/blocks/*", "map": "map/map-*"}
    path = next(iter((tmp_path / "copy").glob(patterns[name])))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    copied = {"index_url": tmp_path / "copy/index", "map_url": tmp_path / "copy/map"}
    args = arguments(planted, tmp_path / "checks", **copied)
    code, out, err = run(capsys, args)
    assert (code, out) == (2, "")
    assert str(path) in err
    assert "the file is damaged" in err
    assert not list((tmp_path / "checks").glob("*/report*"))


def test_input_that_does_not_belong_together_is_refused(planted, data, tmp_path, capsys):
    wrong = {
        "was built from the dataset": {"retrieval_url": data.retrieval.url},
        "was made for the training dataset": {"dataset_url": data.training.url},
        "belong together": {"map_url": None},
        "expected the folder that jobs.build_index prints": {"index_url": str(tmp_path)},
        "cudf": {"measure.backend": "cudf"},
    }
    for message, options in wrong.items():
        code, _, err = run(capsys, arguments(planted, tmp_path, **options))
        assert (code, message in err) == (2, True), err
    other = write_map(
        tmp_path / "map",
        planted[0].training,
        planted[0].retrieval,
        planted[0].map.load().neighbors,
        index_fingerprint="0" * 32,
    )
    code, _, err = run(capsys, arguments(planted, tmp_path, map_url=other.url))
    assert code == 2
    assert "name the index that the map was built with" in err


def test_a_killed_check_starts_again(planted, finished, tmp_path, capsys):
    args = arguments(planted, tmp_path)
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs.check_index", *args],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    started = time.monotonic()
    while not list(tmp_path.glob("*/.scratch-*/chunks/part-*")):
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < started + 120
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    [folder] = tmp_path.iterdir()
    assert not (folder / "report.json").exists()
    checked(capsys, args)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    assert (folder / "report.html").read_bytes() == (finished / "report.html").read_bytes()
