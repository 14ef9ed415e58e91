"""What the notebooks look at: URLs given to them, or those that a finished `make demo` left in its
folder, and what else has to be read before there is anything to show.

Everything is read through fsspec, so local folders and s3:// URLs are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from etl.storage import join_url, read_json
from indexing.built_index import BuiltIndex
from indexing.embedder import EmbedderConfig
from model.metrics import NAME, read_lines

_INDEX_STAGES = ("prepare", "index", "knn-train")
_TRAINING_STAGES = ("prepare", "index", "knn-test", "train-plain", "train-retro")
_EVALUATIONS = ("evaluate-retro-text", "evaluate-retro-facts")


class NotebookError(ValueError):
    """Parameters of a notebook that do not belong together."""


@dataclass(frozen=True)
class IndexInputs:
    """An index, what it was built from, and the map of a dataset's chunks into it, if there is one.

    Attributes:
        dataset_url: Dataset that the map belongs to; None without a map.
    """

    index_url: str
    retrieval_url: str
    dataset_url: str | None = None
    map_url: str | None = None


def index_inputs(
    run_folder: str,
    index_url: str | None = None,
    retrieval_url: str | None = None,
    dataset_url: str | None = None,
    map_url: str | None = None,
) -> IndexInputs:
    """The URLs given, or where none is given those of the demo in `run_folder`: never a mixture.

    Raises:
        NotebookError: some are given, but not those that belong to them.
        FileNotFoundError: no finished demo is there.
    """
    if not any((index_url, retrieval_url, dataset_url, map_url)):
        prepared, index, built = _stages(run_folder, _INDEX_STAGES)
        urls = {name: found["url"] for name, found in prepared["datasets"].items()}
        return IndexInputs(index["index_url"], urls["retrieval"], urls["train"], built["map_url"])
    if not index_url or not retrieval_url or bool(dataset_url) != bool(map_url):
        raise NotebookError(
            f"index_url is {index_url}, retrieval_url {retrieval_url}, dataset_url {dataset_url}, "
            f"map_url {map_url}; give the first two (with both or none of the others), or none of "
            "the four to look at the demo in run_folder"
        )
    return IndexInputs(index_url, retrieval_url, dataset_url or None, map_url or None)


@dataclass(frozen=True)
class TrainingInputs:
    """Training runs, and what the last of them is evaluated on and generates with.

    Attributes:
        runs: URLs of runs by the name they are shown under; the last one is a model with retrieval.
        evaluations: Results of jobs.evaluate by name; empty: none was made.
        dataset_url: A held-out dataset, which map_url belongs to.
        prompts: To continue.
    """

    runs: dict[str, str]
    evaluations: dict[str, dict[str, Any]]
    index_url: str
    retrieval_url: str
    dataset_url: str
    map_url: str
    prompts: tuple[str, ...] = ()

    @property
    def run_url(self) -> str:
        return list(self.runs.values())[-1]


def training_inputs(
    run_folder: str,
    run_urls: Sequence[str] = (),
    evaluation_urls: Sequence[str] = (),
    index_url: str | None = None,
    retrieval_url: str | None = None,
    dataset_url: str | None = None,
    map_url: str | None = None,
) -> TrainingInputs:
    """The URLs given, or where none is given those of the demo in `run_folder`: never a mixture.

    Raises:
        NotebookError: some are given, but not those that belong to them.
        FileNotFoundError: no finished demo, or no finished evaluation, is there.
    """
    urls = (index_url, retrieval_url, dataset_url, map_url)
    if not any((*run_urls, *evaluation_urls, *urls)):
        return _demo_training(run_folder)
    if not run_urls or not index_url or not retrieval_url or not dataset_url or not map_url:
        raise NotebookError(
            f"run_urls is {list(run_urls)}, index_url {index_url}, retrieval_url {retrieval_url}, "
            f"dataset_url {dataset_url}, map_url {map_url}; give all of them, or none to look at "
            "the demo in run_folder"
        )
    found = {name: _evaluation(url) for name, url in _named("evaluation_urls", evaluation_urls)}
    runs = dict(_named("run_urls", run_urls))
    return TrainingInputs(runs, found, index_url, retrieval_url, dataset_url, map_url)


def _demo_training(run_folder: str) -> TrainingInputs:
    prepared, index, built, plain, retro = _stages(run_folder, _TRAINING_STAGES)
    evaluated = _stages(run_folder, (*_EVALUATIONS, "generate"))
    urls = {name: found["url"] for name, found in prepared["datasets"].items()}
    return TrainingInputs(
        runs={"plain": plain["run_url"], "retro": retro["run_url"]},
        evaluations=dict(zip(("natural text", "facts"), evaluated, strict=False)),
        index_url=index["index_url"],
        retrieval_url=urls["retrieval"],
        dataset_url=urls["test"],
        map_url=built["map_url"],
        prompts=(evaluated[-1]["prompt"],),
    )


def _stages(run_folder: str, names: Sequence[str]) -> list[dict[str, Any]]:
    try:
        return [read_json(join_url(run_folder, "stages", f"{name}.json")) for name in names]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{run_folder}: no finished demo ({error}); run `make demo`, name its folder in "
            "run_folder (RETROMILL_RUN_FOLDER), or give the URLs of your own artefacts"
        ) from None


def _evaluation(url: str) -> dict[str, Any]:
    try:
        return read_json(join_url(url, "report.json"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{url}: no report.json; expected the folder evaluation-KEY that jobs.evaluate makes "
            "in its output_url"
        ) from None


def _named(parameter: str, urls: Sequence[str]) -> list[tuple[str, str]]:
    """URLs with the last parts of their paths, by which they are shown."""
    names = [url.rstrip("/").rpartition("/")[2] for url in urls]
    if len(set(names)) < len(names):
        raise NotebookError(f"{parameter} is {list(urls)}; expected folders of different names")
    return list(zip(names, urls, strict=True))


def embedder_of(index: BuiltIndex) -> EmbedderConfig:
    """The embedder that an index was built with, from its manifest."""
    found = index.manifest["embedder"]
    return EmbedderConfig(
        name=found["name"],
        dtype=found["dtype"],
        batch_size=found["batch_size"],
        revision=found["revision"],
    )


def metrics_of(runs: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Lines of metrics.jsonl by name of the run.

    Raises:
        FileNotFoundError: a run has none.
    """
    lines = {name: read_lines(url) for name, url in runs.items()}
    for name, found in lines.items():
        if not found:
            raise FileNotFoundError(
                f"{runs[name]}: no {NAME}, or nothing in it yet; expected the folder that "
                "jobs.pretrain prints"
            )
    return lines
