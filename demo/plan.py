"""What a run of the demo works on: how much text fits into the time, the corpus files and the
tokenizer.

Everything here is decided once and written down (`plan.json`, `corpus/`, `tokenizer.json`), so that
a run that was killed continues with the same data.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import fsspec
import orjson
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.facts import make_facts
from demo.installed import installed_documents
from etl.loose_json import Document, find_sources, plan_splits, read_documents
from etl.storage import write_atomically
from etl.tokenizer import EOD_TOKEN
from indexing.embedder import EmbedderConfig, load_embedder

log = logging.getLogger(__name__)

TEXT, FACTS = "text.jsonl", "facts.jsonl"
SPLIT_KEY = "retromill_split"
"""Field of the facts that says which dataset they belong to."""

_VOCABULARY = 8192
_INPUT_BYTES = 8 << 20
_LEAST_TEXT_BYTES, _MOST_TEXT_BYTES = 400_000, 8 << 20
_EMBEDDING_S = 140.0
_BYTES_A_CHUNK = 210
_CHUNKS_A_PLACE = 4
HELD_OUT_PLACES = (40, 160)
_PLACES_A_TEXT_CHUNK = 0.2


@dataclass(frozen=True)
class Plan:
    """Sizes of the corpus.

    Attributes:
        chunks_per_s: Embedding rate measured on this machine, over all workers.
        text_bytes: Upper bound of the natural text.
        places: Invented places of the training split.
    """

    chunks_per_s: float
    text_bytes: int
    places: int


def embedding_rate(embedder: EmbedderConfig, _worker: int = 0) -> float:
    """Chunks a second that this process embeds, measured for a few seconds after the model is
    loaded."""
    model = load_embedder(embedder)
    sentence = "the quick brown fox jumps over a lazy dog while rain falls in northern hills"
    words = sentence.split(" ")
    texts = [" ".join(words[(i + j) % len(words)] for j in range(60)) for i in range(64)]
    model.embed(texts)
    started, count = time.monotonic(), 0
    while (elapsed := time.monotonic() - started) < 4.0:
        model.embed(texts)
        count += len(texts)
    return count / elapsed


def make_plan(chunks_per_s: float, own_input: bool) -> Plan:
    """As much as can be embedded in the time set aside for it: of n chunks of text and their
    facts."""
    affordable = chunks_per_s * _EMBEDDING_S - _CHUNKS_A_PLACE * sum(HELD_OUT_PLACES)
    chunks = affordable / (1 + _CHUNKS_A_PLACE * _PLACES_A_TEXT_CHUNK)
    text_bytes = int(min(max(chunks * _BYTES_A_CHUNK, _LEAST_TEXT_BYTES), _MOST_TEXT_BYTES))
    places = int(_PLACES_A_TEXT_CHUNK * text_bytes / _BYTES_A_CHUNK)
    return Plan(round(chunks_per_s, 1), _INPUT_BYTES if own_input else text_bytes, places)


def once(path: Path, make: Callable[[], bytes]) -> bytes:
    """The content of a file that make() gives if it does not exist yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        content = make()
        write_atomically(str(path), lambda file: file.write(content))
    return path.read_bytes()


def load_plan(path: Path, make: Callable[[], Plan]) -> Plan:
    return Plan(**json.loads(once(path, lambda: json.dumps(asdict(make())).encode())))


def write_corpus(folder: Path, plan: Plan, input_url: str | None, text_key: str) -> dict[str, str]:
    """The two loose JSON files of the demo: natural text and facts.

    Raises:
        FileNotFoundError, InputError: the user's input cannot be read.
    """
    text, facts = folder / TEXT, folder / FACTS
    if input_url is None:
        once(text, lambda: _json_lines(installed_documents(plan.text_bytes)))
    else:
        once(text, lambda: b"".join(_own_lines(input_url, plan.text_bytes)))
    once(facts, lambda: _json_lines(_facts(plan.places, text_key)))
    return {"text": str(text), "facts": str(facts)}


def _facts(places: int, text_key: str) -> Iterator[dict[str, Any]]:
    for record in make_facts(places, *HELD_OUT_PLACES):
        split, text = record.pop("split"), record.pop("text")
        yield {**record, SPLIT_KEY: split, text_key: text}


def _json_lines(records: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(record) + b"\n" for record in records)


def _own_lines(input_url: str, limit: int) -> Iterator[bytes]:
    """The lines of the user's files as they are, good or bad; files beyond the limit are cut after
    a line."""
    total = left_out = 0
    for source in find_sources([input_url]):
        opened = fsspec.open(source.url, "rb", compression=source.compression)
        with cast(Any, opened).open() as file:
            for line in file:
                if total + len(line) > limit:
                    left_out += 1
                    continue
                total += len(line)
                yield line if line.endswith(b"\n") else line + b"\n"
    if left_out:
        log.warning(
            "%s: took %.1f MB, left %d lines out; the demo reads at most %.1f MB",
            *(input_url, total / 1e6, left_out, limit / 1e6),
        )


def train_tokenizer(files: Iterable[str], text_key: str) -> bytes:
    """A byte-level BPE tokenizer.json with 8192 entries, trained on the usable documents of the
    corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(files, text_key), trainer)
    return tokenizer.to_str(pretty=True).encode()


def _texts(files: Iterable[str], text_key: str) -> Iterator[str]:
    sources = find_sources(list(files))
    for ranges in plan_splits(sources, 1 << 40):
        for found in read_documents(sources, ranges, text_key, None):
            if isinstance(found, Document):
                yield found.text


def first_question(facts: Path, text_key: str) -> str:
    """A prompt that asks for facts of a held-out place: its document up to the first answer."""
    records = (orjson.loads(line) for line in facts.read_bytes().splitlines())
    asked = (r for r in records if r[SPLIT_KEY] == "test")
    text = next(islice(asked, 1))[text_key]
    return text[: text.index(" ", text.index("\n"))]
