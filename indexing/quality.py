"""What tells whether a Faiss index, and a KNN map of it, can be trusted: recall, search for a
chunk itself, scores, hubs, where neighbors come from, equal and empty chunks, lengths of vectors.

Reads a finished index (and map); gives the report as plain JSON values, which
`indexing/quality_page.py` shows to people.
"""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etl.dataset import Dataset
from indexing import quality_lists, quality_rows, quality_tables
from indexing.embeddings import chunk_texts, dataset_tokenizer
from indexing.quality_lists import ListFacts
from indexing.quality_rows import ChunkFacts
from indexing.quality_search import (
    Judged,
    distribution,
    recall_curve,
    score_summaries,
    self_search,
)
from indexing.quality_tables import GroupSizes, InDegrees, Tables

LONG_RUNS = (8, 16)
_TOP_HUBS = 10
_HUB_CHARACTERS = 300


def measure(judged: Judged, scratch: Path) -> dict[str, Any]:
    """All measurements; `scratch` takes the tables (some 50 bytes a chunk and 20 a neighbor).

    Raises:
        StorageError: an index, embeddings or map file is missing or damaged.
        KNNMapError: the map holds ids that are no chunks.
    """
    with quality_tables.in_this_process():
        return _measure(judged, scratch, Tables(scratch, judged.options.backend))


def _measure(judged: Judged, scratch: Path, tables: Tables) -> dict[str, Any]:
    chunks = quality_rows.write_chunks(scratch / "chunks", judged.retrieval, judged.index)
    quality_rows.write_documents(scratch / "documents", judged.retrieval)
    queries = judged.training or judged.retrieval
    quality_rows.write_documents(scratch / "query_documents", queries)
    lists = _write_lists(judged, queries, scratch / "slots")
    degrees = quality_tables.in_degrees(tables, judged.retrieval.num_chunks, _TOP_HUBS)
    return {
        "recall": judged.sample.measure(judged.finder.candidates).json,
        "recall_by_nprobe": recall_curve(judged),
        "self_search": self_search(judged),
        "scores": score_summaries(judged),
        "lists": _list_summary(judged, lists, queries),
        "hubness": hubness(degrees.histogram, judged.index.manifest["vectors"])
        | {"top": _top_hubs(judged.retrieval, degrees)},
        "affinity": quality_tables.affinity(tables, LONG_RUNS)
        | {"expected": quality_tables.expected_affinity(tables, _own_are_banned(judged))},
        "chunks": _chunk_summary(judged, chunks)
        | {"equal": _equal(quality_tables.equal_chunks(tables))},
        "norms": _norm_summary(chunks),
    }


def _write_lists(judged: Judged, queries: Dataset, folder: Path) -> ListFacts:
    """The neighbor lists of the map, or of searches; overlap of tokens is measured in a sample."""
    retrieval, k = judged.retrieval, judged.k
    blocks: Iterator[quality_lists.ListBlock]
    if judged.map is not None:
        measured = judged.sampled(judged.knn_map.rows) + judged.knn_map.chunk_start
        blocks = quality_lists.map_lists(judged.knn_map, k)
    else:
        ids = judged.listed()
        measured = ids[judged.sampled(len(ids))]
        blocks = quality_lists.searched_lists(judged.finder, retrieval, ids, k)
    return quality_lists.write_slots(folder, queries, retrieval, blocks, k, measured)


def _own_are_banned(judged: Judged) -> bool:
    return judged.map is None or bool(judged.map.manifest.get("remove_duplicate", True))


def _list_summary(judged: Judged, facts: ListFacts, queries: Dataset) -> dict[str, Any]:
    rows, k = facts.rows, facts.k
    return asdict(facts) | {
        "from": "search" if judged.map is None else "map",
        "chunks": queries.num_chunks,
        "fill_rate": facts.slots / max(1, rows * k),
    }


def hubness(histogram: GroupSizes, candidates: int) -> dict[str, Any]:
    """How unevenly neighbor slots fall on the indexed chunks: in-degree skewness (Radovanović et
    al. 2010), share of chunks that are nobody's neighbor, share of the slots that the 1% of chunks
    with the most take."""
    zeros = max(0, candidates - int(histogram.groups.sum()))
    degrees = np.concatenate([[0], histogram.sizes])
    counts = np.concatenate([[zeros], histogram.groups])
    total, slots = counts.sum(), (degrees * counts).sum()
    mean = slots / max(1, total)
    spread = sqrt(((degrees - mean) ** 2 * counts).sum() / max(1, total))
    cubed = ((degrees - mean) ** 3 * counts).sum() / max(1, total)
    top = -(-int(total) // 100)
    taken = np.minimum(counts[::-1], np.maximum(0, top - (np.cumsum(counts[::-1]) - counts[::-1])))
    return {
        "candidates": int(total),
        "slots": int(slots),
        "mean": float(mean),
        "skewness": float(cubed / spread**3) if spread else 0.0,
        "never_retrieved": int(zeros) / max(1, int(total)),
        "top_percent_share": float((taken * degrees[::-1]).sum() / max(1, slots)),
        "most": int(degrees[-1]),
        "by_power_of_two": _by_power_of_two(degrees, counts),
    }


def _by_power_of_two(
    degrees: NDArray[np.int64], counts: NDArray[np.int64]
) -> list[tuple[int, int, int]]:
    """(first, last, chunks) for in-degrees 0, 1, 2..3, 4..7, ..."""
    bounds = [0, *(2**i for i in range(int(degrees[-1]).bit_length() + 1))]
    return [
        (first, stop - 1, int(counts[(degrees >= first) & (degrees < stop)].sum()))
        for first, stop in pairwise(bounds)
    ]


def _top_hubs(retrieval: Dataset, degrees: InDegrees) -> list[dict[str, Any]]:
    if not degrees.top:
        return []
    ids = np.asarray([chunk for chunk, _ in degrees.top])
    texts = chunk_texts(retrieval.get_chunk(ids, continuation=False), dataset_tokenizer(retrieval))
    sources = _sources(retrieval, retrieval.chunk_to_doc(ids))
    return [
        {"chunk": chunk, "times": times, "source": source, "text": text[:_HUB_CHARACTERS]}
        for (chunk, times), source, text in zip(degrees.top, sources, texts, strict=True)
    ]


def _sources(dataset: Dataset, documents: NDArray[np.int64]) -> list[str]:
    sizes = [shard.num_documents for shard in dataset.manifest.shards]
    bases = np.cumsum([0, *sizes])
    owners = np.searchsorted(bases, documents, side="right") - 1
    origins = {int(i): quality_rows.document_origins(dataset, int(i)) for i in np.unique(owners)}
    return [origins[int(i)][d - bases[i]] for i, d in zip(owners, documents, strict=True)]


def _chunk_summary(judged: Judged, facts: ChunkFacts) -> dict[str, Any]:
    counts = facts.token_counts
    few = judged.options.few_tokens
    return {
        "chunks": int(counts.sum()),
        "indexed": judged.index.manifest["indexed_chunks"],
        "vectors": judged.index.manifest["vectors"],
        "all_pads": int(counts[0]),
        "without_text": facts.without_text,
        "few_tokens": few,
        "with_few_tokens": int(counts[1:few].sum()),
        "mean_tokens": float((counts * np.arange(len(counts))).sum() / max(1, counts.sum())),
    }


def _equal(found: dict[str, GroupSizes]) -> dict[str, dict[str, int]]:
    """Groups of equal chunks, the chunks in them, and how many of these are more than one."""
    return {
        name: {
            "groups": int(sizes.groups.sum()),
            "chunks": sizes.members,
            "surplus": sizes.members - int(sizes.groups.sum()),
            "largest": int(sizes.sizes.max(initial=0)),
        }
        for name, sizes in found.items()
    }


def _norm_summary(facts: ChunkFacts) -> dict[str, Any]:
    counts = {name: getattr(facts, name) for name in ("zero", "zero_with_text", "not_finite")}
    return {**counts, "not_unit": facts.not_unit, **distribution(facts.norms)}
