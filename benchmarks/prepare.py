"""Preparation against the raw tokenizer, a NeMo-like pool and datatrove: MB of text per CPU-second.

    python benchmarks/prepare.py --data FOLDER_OF_JSONL_GZ --tokenizer GPT2_FOLDER

All sides take the same file, in turn, in one run; CPU seconds are those of all processes (Java and
workers too), without starting a session and with warm workers. A job costs about 4 CPU-seconds
whatever its size, which weigh on small files. The last line is JSON.

* raw: tiktoken's encode_ordinary on texts in memory, with GPT-2's ranks and its pattern as
  published; raw_grouped: the same with the pattern grouped as in `etl/fast_bpe.py`.
* nemo_like: a process pool over documents that makes ids as NeMo's AutoTokenizer does
  (transformers' fast tokenizer: tokenize, then convert_tokens_to_ids) and writes them; pool: the
  same with one call of the tokenizers library for a document.
* datatrove (JsonlReader, DocumentTokenizer) if it is installed: pip install datatrove.
"""

import argparse
import gzip
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tiktoken

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from etl.fast_bpe import GPT2_PATTERN, FastBPE
from etl.huggingface_tokenizer import HuggingFaceTokenizer
from etl.prepare import PrepareConfig, prepare
from etl.spark import spark_session
from etl.tokenizer import load_tokenizer


def write_corpus(data: Path, path: Path, copies: int) -> list[str]:
    """Loose JSON of all files, `copies` times with a number before each text, so that none is a
    duplicate; returns the texts."""
    texts = []
    with open(path, "w") as file:
        for copy in range(copies):
            for source in sorted(data.glob("*.jsonl.gz")):
                for line in gzip.decompress(source.read_bytes()).splitlines():
                    record = json.loads(line)
                    record["text"] = f"{copy} {record['text']}"
                    texts.append(record["text"])
                    file.write(json.dumps(record) + "\n")
    return texts


class CpuClock:
    """CPU seconds of this process and of all that it started, but for its own. Looked at twice a
    second, so that those of a process that ends are kept."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, float], float] = {}
        self._own = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.seconds()
            self._own = time.thread_time()
            time.sleep(0.5)

    def seconds(self) -> float:
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                key = process.pid, process.create_time()
                self._seen[key] = times.user + times.system
        return sum(list(self._seen.values())) - self._own


def published(fast: FastBPE) -> tiktoken.Encoding:
    """The encoding with GPT-2's pattern as published, without its special token, which slows it."""
    ranks, special = fast._encoding._mergeable_ranks, fast._encoding._special_tokens
    return tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


def raw(encoding: tiktoken.Encoding, texts: list[str]) -> None:
    for text in texts:
        encoding.encode_ordinary(text)


_encode: Callable[[str], list[int]] | None = None


def _load_nemo_like(tokenizer_json: str) -> None:
    global _encode
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_json)
    to_ids: Any = tokenizer.convert_tokens_to_ids
    _encode = lambda text: to_ids(tokenizer.tokenize(text))


def _load_pool(tokenizer_json: str) -> None:
    global _encode
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_json)
    _encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _ids(line: str) -> list[int]:
    assert _encode is not None
    return _encode(json.loads(line)["text"])


def over_documents(pool: Any, path: Path, output: Path, end: int) -> None:
    with open(path) as file, open(output, "wb") as out:
        for ids in pool.imap(_ids, file, 25):
            out.write(np.asarray([*ids, end], np.uint16).tobytes())


def datatrove(path: Path, tokenizer_json: Path, output: Path) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    shutil.rmtree(output, ignore_errors=True)
    steps = [
        JsonlReader(str(path.parent), glob_pattern=path.name),
        DocumentTokenizer(
            str(output / "tokens"),
            tokenizer_name_or_path=str(tokenizer_json),
            eos_token="<|endoftext|>",
            shuffle_documents=False,
        ),
    ]
    LocalPipelineExecutor(steps, tasks=1, logging_dir=str(output / "logs")).run()


def sides(folder: Path, arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], None]]]:
    path = folder / "corpus.jsonl"
    texts = write_corpus(arguments.data, path, arguments.copies)
    tokenizer = load_tokenizer(str(arguments.tokenizer))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    fast = tokenizer.fast
    assert fast is not None, "the tokenizer has no fast path"
    (folder / "tokenizer.json").write_bytes(tokenizer.to_bytes())
    spark = spark_session("retromill benchmark")
    config = PrepareConfig(str(path), str(folder / "ours"), str(arguments.tokenizer))

    def ours() -> None:
        shutil.rmtree(folder / "ours", ignore_errors=True)
        prepare(config, lambda: spark)

    def pool(name: str, load: Callable[[str], None]) -> Callable[[], None]:
        made = multiprocessing.get_context("spawn").Pool(2, load, (str(folder / "tokenizer.json"),))
        return lambda: over_documents(made, path, folder / name, tokenizer.eod_id)

    as_published = published(fast)
    yield "raw", lambda: raw(as_published, texts)
    yield "raw_grouped", lambda: raw(fast._encoding, texts)
    yield "ours", ours
    yield "nemo_like", pool("nemo_like", _load_nemo_like)
    yield "pool", pool("pool", _load_pool)
    if find_spec("datatrove"):
        yield "datatrove", lambda: datatrove(path, folder / "tokenizer.json", folder / "trove")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sides", nargs="*", help="with ours; by default all of them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = dict(sides(folder, arguments))
        wanted = {"ours", *(arguments.sides or runs)}
        runs = {side: work for side, work in runs.items() if side in wanted}
        with open(folder / "corpus.jsonl") as file:
            megabytes = sum(len(json.loads(line)["text"].encode()) for line in file) / 1e6
        runs["ours"]()  # warm workers
        rates: dict[str, list[float]] = {side: [] for side in runs}
        clock = CpuClock()
        for _ in range(arguments.rounds):
            for side, work in runs.items():
                before = clock.seconds()
                work()
                rates[side].append(megabytes / (clock.seconds() - before))
                print(f"{side}: {rates[side][-1]:.2f} MB per CPU-second", file=sys.stderr)
    middle = {side: statistics.median(found) for side, found in rates.items()}
    others = {"raw": "raw_tokenizer"}
    ratios = {
        f"vs_{others.get(side, side)}": middle["ours"] / middle[side]
        for side in middle
        if side != "ours"
    }
    print(json.dumps({"megabytes": megabytes, "mb_per_cpu_s": middle, **ratios}))


if __name__ == "__main__":
    main()
