"""evaluate | `python -m jobs.evaluate` | torch | reads a run's checkpoint and a held-out dataset
with its KNN map | writes losses with retrieval on, off and random.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from etl.dataset import Dataset, check_no_leak
from etl.manifest import HELD_OUT
from indexing.embeddings import dataset_tokenizer
from indexing.knn_manifest import open_map
from jobs.command_line import run_job
from model.checkpoint import check_tokenizer, load_model, require_checkpoint
from model.evaluation import batches_of, loss_sums
from model.retro import Retro
from model.samples import NeighborReader, RandomNeighborReader, SampleReader, split_documents
from model.scoring import scored_tokens, token_byte_counts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out loss, perplexity and bits per byte with retrieval on, off, and with random
    neighbors.

    Attributes:
        run_url: Folder of the jobs.pretrain run.
        dataset_url: Folder of a held-out dataset.
        splits_string: The weights that a run split this dataset by; its last part, test, is scored.
        retrieval_url: Folder of the retrieval dataset; for a model with retrieval.
        map_url: Folder of the held-out dataset's KNN map; for a model with retrieval.
        seq_length: Tokens of a sample.
        neighbors: Neighbors of each chunk.
        batch_size: Samples of one forward pass.
        max_samples: At most this many samples with scored tokens, evenly spread; by default all.
        sources: Score only documents from source files whose name contains this.
        answer_pattern: Score only the text that group 1 of this regular expression matches in a
            document.
    """

    run_url: str
    dataset_url: str
    splits_string: str | None = None
    retrieval_url: str | None = None
    map_url: str | None = None
    seq_length: int = 2048
    neighbors: int = 2
    batch_size: int = 8
    max_samples: int | None = None
    sources: str | None = None
    answer_pattern: str | None = None


def run(config: EvaluateConfig) -> dict[str, Any]:
    dataset = Dataset(config.dataset_url)
    if dataset.manifest.split not in HELD_OUT and config.splits_string is None:
        raise ValueError(
            f"{config.dataset_url} is the {dataset.manifest.split} dataset; expected one of "
            f"{HELD_OUT}, or the splits_string that its run was given"
        )
    record = require_checkpoint(config.run_url)
    check_tokenizer(record, dataset.manifest)
    if bool(record["config"]["dec_cross_attention"]) != bool(
        config.map_url and config.retrieval_url
    ):
        raise ValueError(
            "map_url and retrieval_url belong to a model with retrieval, and only to one"
        )
    readers = _readers(config, dataset)
    model = load_model(config.run_url)
    token_bytes = dataset_tokenizer(dataset).token_bytes
    scored = scored_tokens(dataset, token_bytes, config.sources, config.answer_pattern)
    byte_counts = token_byte_counts(dataset, token_bytes)
    samples = _samples(readers["off"], scored, config.max_samples)
    results = {}
    for mode, reader in readers.items():
        log.info("%d samples with retrieval %s", len(samples), mode)
        results[mode] = loss_sums(
            model,
            reader,
            batches_of(samples, config.batch_size),
            retrieval=mode != "off",
            scored=scored,
            byte_counts=byte_counts,
        ).summary()
    return {
        "run_url": config.run_url,
        "parameters": _parameters(model),
        "samples": len(samples),
        **results,
    }


def _parameters(model: Retro) -> int:
    return sum(p.numel() for p in model.parameters())


def _readers(config: EvaluateConfig, dataset: Dataset) -> dict[str, SampleReader]:
    part = None
    if config.splits_string is not None:
        part = split_documents(config.splits_string, dataset.num_documents)[2]
    readers = {"off": SampleReader(dataset, config.seq_length, documents=part)}
    if config.map_url is None or config.retrieval_url is None:
        return readers
    built, retrieval = open_map(config.map_url), Dataset(config.retrieval_url)
    check_no_leak(dataset, retrieval, part)
    for mode, kind in (("on", NeighborReader), ("random", RandomNeighborReader)):
        neighbors = kind.open(dataset, built, retrieval, config.neighbors)
        readers[mode] = SampleReader(dataset, config.seq_length, neighbors, part)
    return readers


def _samples(reader: SampleReader, scored: Any, limit: int | None) -> Any:
    """Numbers of the samples in which something is scored."""
    labels = np.flatnonzero(scored) - reader.first_token
    labels = labels[(labels > 0) & (labels < reader.num_tokens)]
    numbers = np.unique((labels - 1) // reader.seq_length)
    if len(numbers) == 0:
        raise ValueError(
            f"{reader.dataset.url}: nothing to score; no document matches sources and "
            "answer_pattern"
        )
    if limit is None or limit >= len(numbers):
        return numbers
    return numbers[np.linspace(0, len(numbers) - 1, limit).astype(int)]


if __name__ == "__main__":
    run_job(
        "Evaluate a run on held-out data with retrieval on, off and random.", EvaluateConfig, run
    )
