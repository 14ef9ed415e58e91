"""evaluate | `python -m jobs.evaluate`, or `torchrun` | torch | reads a run's checkpoint and a
held-out dataset with its KNN map | writes losses under each condition, a report (JSON, HTML).
"""

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from etl.dataset import Dataset, check_no_leak
from etl.manifest import HELD_OUT
from etl.storage import StageFolder, content_key, join_url, write_atomically
from indexing.embeddings import dataset_tokenizer
from indexing.html_page import html_page
from indexing.knn_manifest import BuiltMap, open_map
from indexing.leaks import scan_map
from jobs.command_line import run_job
from model.bootstrap import paired_difference
from model.checkpoint import check_tokenizer, load_model, require_checkpoint
from model.conditions import (
    DEFAULT,
    FractionReader,
    names_of,
    open_condition,
    same_as,
    short_rows,
)
from model.evaluation_overlap import describe_overlaps, measure_overlaps
from model.evaluation_report import BASELINES, report_sections, sentences
from model.evaluation_run import ChunkSums, Evaluation, Windows, scored_samples
from model.parallel import process_group
from model.samples import SampleReader, split_documents
from model.scoring import scored_tokens, token_byte_counts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out loss, perplexity and bits per byte under several conditions: how much retrieval
    helps, where that comes from, and whether anything leaked.

    Attributes:
        run_url: Folder of the jobs.pretrain run.
        dataset_url: Folder of a held-out dataset.
        output_url: Folder for the report, and for partial results: an evaluation that was killed
            continues there. Without it the result is only printed.
        splits_string: The weights that a run split this dataset by; its last part, test, is scored.
        retrieval_url: Folder of the retrieval dataset; for a model with retrieval.
        map_url: Folder of the held-out dataset's KNN map; for a model with retrieval.
        equal_step_url: Run of a plain decoder that was trained for as many steps.
        equal_time_url: Run of a plain decoder that was trained for as much time.
        conditions: A list such as ["on", "off"], with quotes (YAML takes a bare on for a boolean),
            of on, off, random (chunks of the database), shuffled (neighbors of another
            chunk), oracle (the true continuation, a control), n_only and f_only (neighbors without
            their continuation, or it alone), k=N (N neighbors) and database=F (a share F of the
            database's documents; give the map many neighbors for small shares).
        seq_length: Tokens of a sample.
        stride: Tokens from one sample to the next, by default half of seq_length. Every label is
            scored once, with seq_length - stride tokens before it or more.
        neighbors: Neighbors of each chunk.
        batch_size: Samples of one forward pass. Part of the result: it changes the last bits.
        max_samples: At most this many samples with scored tokens, evenly spread; by default all.
        sources: Score only documents from source files whose name contains this.
        answer_pattern: Score only the text that group 1 of this regular expression matches in a
            document.
        device: cpu or cuda.
        precision: Arithmetic of the model.
    """

    run_url: str
    dataset_url: str
    output_url: str | None = None
    splits_string: str | None = None
    retrieval_url: str | None = None
    map_url: str | None = None
    equal_step_url: str | None = None
    equal_time_url: str | None = None
    conditions: tuple[str, ...] = DEFAULT
    seq_length: int = 2048
    stride: int | None = None
    neighbors: int = 2
    batch_size: int = 8
    max_samples: int | None = None
    sources: str | None = None
    answer_pattern: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["32", "bf16"] = "32"


@dataclass(frozen=True)
class _Data:
    """What a model is evaluated on; retrieval and map are None for a plain decoder."""

    dataset: Dataset
    documents: tuple[int, int] | None
    retrieval: Dataset | None
    map: BuiltMap | None


def run(config: EvaluateConfig) -> dict[str, Any] | None:
    data = _open(config)
    with process_group(config.device, 1) as mesh:
        result = _evaluate(config, data, mesh)
        return result if mesh.get_rank() == 0 else None


def _open(config: EvaluateConfig) -> _Data:
    dataset = Dataset(config.dataset_url)
    if dataset.manifest.split not in HELD_OUT and config.splits_string is None:
        raise ValueError(
            f"{config.dataset_url} is the {dataset.manifest.split} dataset; expected one of "
            f"{HELD_OUT}, or the splits_string that its run was given"
        )
    documents = None
    if config.splits_string is not None:
        documents = split_documents(config.splits_string, dataset.num_documents)[2]
    record = require_checkpoint(config.run_url)
    check_tokenizer(record, dataset.manifest)
    has_retrieval = bool(record["config"]["dec_cross_attention"])
    if has_retrieval != bool(config.map_url and config.retrieval_url):
        raise ValueError(
            "map_url and retrieval_url belong to a model with retrieval, and only to one"
        )
    for url in _baselines(config).values():
        plain = require_checkpoint(url)
        check_tokenizer(plain, dataset.manifest)
        if plain["config"]["dec_cross_attention"] or not has_retrieval:
            raise ValueError(
                f"{url} is no plain decoder to compare a model with retrieval with; give "
                f"{' and '.join(BASELINES.values())} runs with an empty dec_cross_attention"
            )
    if config.map_url is None or config.retrieval_url is None:
        return _Data(dataset, documents, None, None)
    built, retrieval = open_map(config.map_url), Dataset(config.retrieval_url)
    built.check_parents(dataset, retrieval)
    check_no_leak(dataset, retrieval, documents)
    return _Data(dataset, documents, retrieval, built)


def _baselines(config: EvaluateConfig) -> dict[str, str]:
    urls = {name: getattr(config, option) for name, option in BASELINES.items()}
    return {name: url for name, url in urls.items() if url is not None}


def _windows(config: EvaluateConfig, data: _Data) -> Windows:
    dataset = data.dataset
    token_bytes = dataset_tokenizer(dataset).token_bytes
    scored = scored_tokens(dataset, token_bytes, config.sources, config.answer_pattern)
    stride = config.seq_length // 2 if config.stride is None else config.stride
    reader = SampleReader(dataset, config.seq_length, None, data.documents, stride)
    return Windows(
        dataset=dataset,
        documents=data.documents,
        seq_length=config.seq_length,
        stride=stride,
        numbers=scored_samples(reader, scored, config.max_samples),
        batch_size=config.batch_size,
        scored=scored,
        byte_counts=token_byte_counts(dataset, token_bytes),
    )


def _evaluate(config: EvaluateConfig, data: _Data, mesh: DeviceMesh) -> dict[str, Any]:
    windows = _windows(config, data)
    kept = _Report.of(config, windows, data)
    finished = kept.finished()
    if finished is not None:
        log.info("evaluated before: %s", kept.folder.url if kept.folder else "")
        return finished
    leaks = _scan(data)
    precision = config.precision
    evaluation = Evaluation(windows, config.output_url, config.device, precision, mesh)
    losses, facts = _condition_losses(config, data, evaluation)
    for name, url in _baselines(config).items():
        model = evaluation.prepare(load_model(url))
        folder = evaluation.folder(_identity(url))
        losses[name] = evaluation.losses(model, name, None, folder)
    result = _result(config, data, windows, losses) | facts | {"leaks": leaks}
    if "on" in losses and "off" in losses and data.map is not None and data.retrieval is not None:
        reader = open_condition(
            "on", data.dataset, data.map.load(), data.retrieval, config.neighbors
        )
        assert reader is not None
        overlaps = measure_overlaps(data.dataset, reader, np.flatnonzero(losses["on"].tokens))
        result["overlap"] = describe_overlaps(overlaps, losses, data.dataset.chunk_size)
    result["says"] = sentences(result)
    return kept.publish(result) if mesh.get_rank() == 0 else result


def _scan(data: _Data) -> dict[str, Any] | None:
    """Refuses a map with leaks before anything is measured."""
    if data.map is None or data.retrieval is None:
        return None
    chunks = None
    if data.documents is not None:
        first = data.dataset.document_first_chunk
        chunks = (int(first[data.documents[0]]), int(first[data.documents[1]]))
    found = scan_map(data.dataset, data.retrieval, data.map, chunk_range=chunks)
    found.check()
    return found.json


def _identity(url: str) -> list[Any]:
    """Of a run's newest checkpoint."""
    record = require_checkpoint(url)
    return [url, record["folder"], record["files"]]


def _condition_losses(
    config: EvaluateConfig, data: _Data, evaluation: Evaluation
) -> tuple[dict[str, ChunkSums], dict[str, Any]]:
    """Losses of the run's model by condition, and what there is to say about it."""
    knn_map = data.map.load() if data.map is not None else None
    names, impossible = names_of(config.conditions, knn_map)
    model = evaluation.prepare(load_model(config.run_url))
    about = [_identity(config.run_url)]
    if data.map is not None and data.retrieval is not None:
        about += [data.map.fingerprint, data.retrieval.manifest.fingerprint, config.neighbors]
    folder, losses, short = evaluation.folder(*about), {}, {}
    for name in names:
        reader = None
        if knn_map is not None and data.retrieval is not None:
            reader = open_condition(name, data.dataset, knn_map, data.retrieval, config.neighbors)
        measured = same_as(name, config.neighbors)
        if measured not in losses:
            losses[measured] = evaluation.losses(model, measured, reader, folder)
        losses[name] = losses[measured]
        if isinstance(reader, FractionReader):
            short[name] = short_rows(reader, np.flatnonzero(losses[name].tokens))
    width = knn_map.k if knn_map is not None else 0
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "not_measured": dict.fromkeys(impossible, f"the map holds {width} neighbors a chunk"),
        "short_rows": short,
    }
    return losses, facts


def _result(
    config: EvaluateConfig, data: _Data, windows: Windows, losses: dict[str, ChunkSums]
) -> dict[str, Any]:
    """Sums of each condition, its difference from off with interval, that of on from random
    neighbors and baselines, and missing baselines."""
    documents = {name: sums.by_document(data.dataset) for name, sums in losses.items()}
    off, found = documents.get("off"), {}
    for name, sums in losses.items():
        found[name] = sums.total().summary()
        if off is not None and name != "off":
            difference = paired_difference(documents[name].loss, off.loss, off.tokens)
            found[name]["difference_from_off"] = asdict(difference)
        if name in (*BASELINES, "random") and "on" in documents:
            on = documents["on"]
            difference = paired_difference(on.loss, documents[name].loss, on.tokens)
            found[name]["difference_of_on"] = asdict(difference)
    return {
        "run_url": config.run_url,
        "dataset_url": config.dataset_url,
        "samples": len(windows.numbers),
        "seq_length": windows.seq_length,
        "stride": windows.stride,
        "neighbors": config.neighbors if data.map is not None else 0,
        "missing": [] if data.map is None else [n for n in BASELINES if n not in losses],
        **found,
    }


@dataclass(frozen=True)
class _Report:
    """The files of a finished evaluation: report.json, and report.html for people."""

    folder: StageFolder | None

    @classmethod
    def of(cls, config: EvaluateConfig, windows: Windows, data: _Data) -> "_Report":
        if config.output_url is None:
            return cls(None)
        models = [_identity(url) for url in (config.run_url, *_baselines(config).values())]
        built = data.map.fingerprint if data.map is not None else None
        options = asdict(replace(config, output_url=None))
        key = content_key(windows.key, models, built, options)[:16]
        return cls(StageFolder(join_url(config.output_url, f"evaluation-{key}")))

    def finished(self) -> dict[str, Any] | None:
        return self.folder.record("report") if self.folder is not None else None

    def publish(self, result: dict[str, Any]) -> dict[str, Any]:
        if self.folder is None:
            return result
        page = html_page("Evaluation", report_sections(result))
        url = self.folder.path_of("report.html")
        write_atomically(url, lambda file: file.write(page.encode()))
        log.info("%s", url)
        return self.folder.publish("report", result | {"report_url": url})


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    run_job("Evaluate a run on held-out data, condition by condition.", EvaluateConfig, run)
