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
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.facts import fills_chunk, make_facts
from demo.installed import installed_documents
from etl.compressed import open_source
from etl.records import Document, Fields, RecordReader
from etl.sources import InputError, find_sources, plan_splits
from etl.splits import assign_split, parse_weights
from etl.storage import write_atomically
from etl.tokenizer import EOD_TOKENS, TextTokenizer, load_tokenizer
from indexing.embedder import EmbedderConfig, load_embedder

log = logging.getLogger(__name__)

TEXT, FACTS = "text.jsonl", "facts.jsonl"
SPLIT_KEY = "retromill_split"
"""Field of the facts that says which dataset they belong to."""
SPLITS_STRING = "94,2,4"
CHUNK_SIZE = 64

_VOCABULARY = 8192
_LEAST_TEXT_BYTES, _MOST_TEXT_BYTES = 400_000, 8 << 20
_EMBEDDING_S, _OWN_EMBEDDING_S = 140.0, 280.0
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
    facts. The user's own text is given more time, so that most of it is used."""
    held_out = _CHUNKS_A_PLACE * sum(HELD_OUT_PLACES)
    chunks = (chunks_per_s * _EMBEDDING_S - held_out) / (1 + _CHUNKS_A_PLACE * _PLACES_A_TEXT_CHUNK)
    text_bytes = _text_bytes(chunks)
    places = int(_PLACES_A_TEXT_CHUNK * text_bytes / _BYTES_A_CHUNK)
    if own_input:
        facts = held_out + _CHUNKS_A_PLACE * places
        text_bytes = _text_bytes(chunks_per_s * _OWN_EMBEDDING_S - facts)
    return Plan(round(chunks_per_s, 1), text_bytes, places)


def _text_bytes(chunks: float) -> int:
    return int(min(max(chunks * _BYTES_A_CHUNK, _LEAST_TEXT_BYTES), _MOST_TEXT_BYTES))


def once(path: Path, make: Callable[[], bytes]) -> bytes:
    """The content of a file that make() gives if it does not exist yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        content = make()
        write_atomically(str(path), lambda file: file.write(content))
    return path.read_bytes()


def load_plan(path: Path, make: Callable[[], Plan]) -> Plan:
    return Plan(**json.loads(once(path, lambda: json.dumps(asdict(make())).encode())))


def write_text(folder: Path, plan: Plan, input_url: str | None) -> Path:
    """The loose JSON file of natural text.

    Raises:
        FileNotFoundError, InputError, CompressedError: the user's input cannot be read.
    """
    path = folder / TEXT
    if input_url is None:
        once(path, lambda: _json_lines(installed_documents(plan.text_bytes)))
    else:
        once(path, lambda: b"".join(_own_lines(input_url, plan.text_bytes)))
    return path


def write_facts(folder: Path, plan: Plan, text_key: str, tokenizer_url: str) -> Path:
    """The loose JSON file of facts; their introductions fill a chunk of the tokenizer's tokens."""
    path = folder / FACTS
    once(path, lambda: _json_lines(_facts(plan.places, text_key, load_tokenizer(tokenizer_url))))
    return path


def _facts(places: int, text_key: str, tokenizer: TextTokenizer) -> Iterator[dict[str, Any]]:
    for record in make_facts(places, *HELD_OUT_PLACES, fills_chunk(tokenizer, CHUNK_SIZE)):
        split, text = record.pop("split"), record.pop("text")
        yield {**record, SPLIT_KEY: split, text_key: text}


def _json_lines(records: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(record) + b"\n" for record in records)


def _own_lines(input_url: str, limit: int) -> Iterator[bytes]:
    """The lines of the user's files as they are, good or bad, but for those that would pass the
    limit."""
    total = left_out = 0
    for source in find_sources([input_url]):
        if source.kind != "lines":
            raise InputError(f"{source.url}: the demo reads loose JSON lines (.jsonl, .json)")
        with open_source(source.url, source.compression) as file:
            for line in file:
                if total + len(line) > limit:
                    left_out += 1
                    continue
                total += len(line)
                yield line if line.endswith(b"\n") else line + b"\n"
    if left_out:
        log.warning(
            "%s: took %.1f MB, left %d lines out; this machine can embed %.1f MB in a demo's time",
            *(input_url, total / 1e6, left_out, limit / 1e6),
        )


def split_seed(text: Path, text_key: str) -> int:
    """The first seed with which natural text falls to train and to test, so that a handful of
    documents is enough.

    Raises:
        InputError: fewer than two different documents that can be used.
    """
    hashes = {document.content_hash for document in _documents(text, text_key)}
    if len(hashes) < 2:
        raise InputError(
            f"the input has {len(hashes)} different usable documents (field {text_key!r}); the "
            "demo needs at least 2, one to train on and one to hold out"
        )
    weights = parse_weights(SPLITS_STRING)
    return next(
        seed
        for seed in count()
        if {"train", "test"} <= {assign_split(h, weights, seed) for h in hashes}
    )


def train_tokenizer(text: Path, text_key: str, places: int) -> bytes:
    """A byte-level BPE tokenizer.json with 8192 entries, trained on the usable documents of the
    natural text and on facts about other places than the corpus has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[EOD_TOKENS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    facts = make_facts(places, 0, 0, lambda text: len(text) >= 5 * CHUNK_SIZE, seed=1)
    texts = (document.text for document in _documents(text, text_key))
    tokenizer.train_from_iterator(chain(texts, (fact["text"] for fact in facts)), trainer)
    return tokenizer.to_str(pretty=True).encode()


def _documents(text: Path, text_key: str) -> Iterator[Document]:
    sources = find_sources([str(text)])
    reader = RecordReader(tuple(sources), Fields(text_key))
    for ranges in plan_splits(sources, 1 << 40):
        yield from (found for found in reader.read(ranges) if isinstance(found, Document))


def first_question(facts: Path, text_key: str) -> str:
    """A prompt that asks for facts of a held-out place: its document up to the first answer."""
    records = (orjson.loads(line) for line in facts.read_bytes().splitlines())
    asked = (r for r in records if r[SPLIT_KEY] == "test")
    text = next(islice(asked, 1))[text_key]
    return text[: text.index(" ", text.index("\n"))]
