"""What one preparation task does: read the records of a split, tokenize them, write its shard of
every dataset.

A plain idempotent function of (task, split number); Spark only schedules it. A record announces the
finished shards.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from etl.loose_json import Document, InputError, Range, Reject, SourceFile, read_documents
from etl.manifest import DOCUMENT_DTYPE, HELD_OUT, Shard, Split
from etl.retmmap import Layout, RetMMapWriter
from etl.storage import StageFolder, scratch_folder
from etl.tokenizer import ByteLevelTokenizer

SPLITS: tuple[Split, ...] = ("train", "validation", "test", "retrieval")
HASH_DTYPE = np.dtype([("high", "<i8"), ("low", "<i8"), ("ordinal", "<i4")])
_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 4096


def parse_weights(splits_string: str) -> dict[Split, float]:
    """Weights that add up to 1, from "train,validation,test" or "train,validation,test,retrieval".

    Raises:
        InputError: not three or four numbers, a negative one, or all zero.
    """
    try:
        weights = [float(part) for part in splits_string.replace("/", ",").split(",")]
    except ValueError:
        weights = []
    if len(weights) not in (3, 4) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise InputError(
            f"splits_string is {splits_string!r}; expected three or four weights, as 98,1,1 "
            "(train, validation, test) "
            "or 50,1,1,48 (and retrieval)"
        )
    weights += [0.0] * (4 - len(weights))
    return {split: weight / sum(weights) for split, weight in zip(SPLITS, weights, strict=True)}


def assign_split(content_hash: bytes, weights: dict[Split, float], seed: int) -> Split:
    """The split of a document by the hash of its text: the same on any machine, in any order, for
    equal texts."""
    digest = hashlib.blake2b(content_hash, digest_size=8, key=str(seed).encode()).digest()
    position = int.from_bytes(digest, "little") / 2**64
    possible: list[Split] = [split for split in SPLITS if weights[split] > 0]
    for split in SPLITS:
        position -= weights[split]
        if position < 0:
            return split
    return possible[-1]


@dataclass(frozen=True)
class SplitTask:
    """Everything a task needs besides the number of its split; picklable."""

    folder: StageFolder
    sources: tuple[SourceFile, ...]
    splits: tuple[tuple[Range, ...], ...]
    tokenizer_json: str
    eod_token: str
    text_key: str
    split_key: str | None
    weights: dict[Split, float]
    split_seed: int
    training: Layout
    retrieval: Layout | None
    append_eod: bool
    nemo_padding: bool
    fail_on_bad_record: bool

    def record_name(self, index: int) -> str:
        return f"splits/{index:05d}"

    def layout_of(self, split: Split) -> Layout:
        if split != "retrieval":
            return self.training
        if self.retrieval is None:
            raise RuntimeError("no retrieval dataset was asked for")
        return self.retrieval

    @cached_property
    def tokenizer(self) -> ByteLevelTokenizer:
        return ByteLevelTokenizer(Tokenizer.from_str(self.tokenizer_json), self.eod_token)

    def records(self, index: int) -> Iterator[Document | Reject]:
        return read_documents(self.sources, self.splits[index], self.text_key, self.split_key)

    def content_hashes(self, index: int) -> Iterator[NDArray[np.void]]:
        """Blocks of HASH_DTYPE: the content hash and the ordinal of each usable record of the
        split."""
        block: list[tuple[int, int, int]] = []
        documents = (record for record in self.records(index) if isinstance(record, Document))
        for ordinal, document in enumerate(documents):
            high, low = np.frombuffer(document.content_hash, "<i8")
            block.append((high, low, ordinal))
            if len(block) == 65536:
                yield np.array(block, HASH_DTYPE)
                block = []
        yield np.array(block, HASH_DTYPE)

    def write(self, index: int, dropped: frozenset[int]) -> str | None:
        """Writes the split without the documents numbered in `dropped` and publishes its record.

        Returns None, or with fail_on_bad_record the description of the first bad record (then
        nothing is published).
        """
        with scratch_folder(self.folder.url) as scratch:
            writer = _SplitWriter(self, scratch)
            ordinal = -1
            for record in self.records(index):
                if isinstance(record, Reject):
                    if self.fail_on_bad_record:
                        place = f"{self.sources[record.source].url} at byte {record.offset}"
                        return f"{place}: {record.reason}"
                    writer.reject(record)
                    continue
                ordinal += 1
                writer.add(record, ordinal in dropped)
            self.folder.publish(self.record_name(index), writer.finish(f"{index:05d}"))
        return None

    def split_of(self, document: Document) -> Split:
        return (
            cast(Split, document.split)
            if document.split
            else assign_split(document.content_hash, self.weights, self.split_seed)
        )


class _SplitWriter:
    """Documents in, shards of up to four datasets out."""

    def __init__(self, task: SplitTask, scratch: Path) -> None:
        self.task, self.scratch = task, scratch
        self.shards: dict[Split, _ShardWriter] = {}
        self.batch: list[tuple[Document, Split]] = []
        self.batch_characters = 0
        self.counts: Counter[str] = Counter()
        self.rejects: list[Reject] = []

    def reject(self, record: Reject) -> None:
        self.rejects.append(record)

    def add(self, document: Document, is_dropped: bool) -> None:
        if is_dropped:
            self.counts["duplicates_dropped"] += 1
            return
        split = self.task.split_of(document)
        self.counts["documents"] += 1
        self.counts["text_bytes"] += len(document.text.encode())
        self.counts["held_out"] += split in HELD_OUT
        self.batch.append((document, split))
        self.batch_characters += len(document.text)
        if self.batch_characters >= _BATCH_CHARACTERS or len(self.batch) >= _BATCH_DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        tokens = self.task.tokenizer.encode_batch([document.text for document, _ in self.batch])
        if self.task.append_eod:
            for ids in tokens:
                ids.append(self.task.tokenizer.eod_id)
        for split in SPLITS:
            chosen = [
                i for i, (_, assigned) in enumerate(self.batch) if self._belongs(assigned, split)
            ]
            if chosen:
                self._shard(split).add(
                    [self.batch[i][0] for i in chosen], [tokens[i] for i in chosen]
                )
        self.batch, self.batch_characters = [], 0

    def _belongs(self, assigned: Split, split: Split) -> bool:
        if split == "retrieval":
            return self.task.retrieval is not None and assigned not in HELD_OUT
        return assigned == split

    def _shard(self, split: Split) -> "_ShardWriter":
        if split not in self.shards:
            writer = _ShardWriter(self.scratch, split, self.task.layout_of(split), self.task)
            self.shards[split] = writer
        return self.shards[split]

    def finish(self, stem: str) -> dict[str, Any]:
        """Stores the shards and the rejects; the split's record."""
        if self.batch:
            self._flush()
        folders = {split: StageFolder(self.task.folder.path_of(split)) for split in self.shards}
        shards = {
            split: asdict(writer.store(folders[split], stem))
            for split, writer in self.shards.items()
        }
        files = {
            f"{split}.{part}": shard[part] | {"name": f"{split}/{shard[part]['name']}"}
            for split, shard in shards.items()
            for part in ("bin", "idx", "docs")
        }
        if self.rejects:
            files["rejects"] = self._store_rejects(stem)
        reasons = Counter(reject.reason for reject in self.rejects)
        return {
            "shards": shards,
            "files": files,
            "counts": dict(self.counts),
            "reject_reasons": dict(reasons),
        }

    def _store_rejects(self, stem: str) -> dict[str, Any]:
        path = self.scratch / "rejects.jsonl"
        with open(path, "w") as file:
            for reject in self.rejects:
                entry = {
                    "file": self.task.sources[reject.source].url,
                    "offset": reject.offset,
                    "reason": reject.reason,
                }
                file.write(json.dumps(entry) + "\n")
        [stored] = self.task.folder.store(f"rejects/{stem}", path)
        return asdict(stored)


class _ShardWriter:
    """One dataset's shard while it is written in scratch."""

    def __init__(self, scratch: Path, split: Split, layout: Layout, task: SplitTask) -> None:
        self.paths = [scratch / f"{split}{suffix}" for suffix in (".bin", ".idx", ".docs.npy")]
        self.file: IO[bytes] = open(self.paths[0], "wb")  # noqa: SIM115
        self.writer = RetMMapWriter(self.file, layout, task.tokenizer.pad_id, task.nemo_padding)  # type: ignore[arg-type]
        self.documents: list[NDArray[np.void]] = []
        self.num_tokens = 0

    def add(self, documents: list[Document], tokens: list[list[int]]) -> None:
        lengths = np.asarray([len(ids) for ids in tokens])
        self.writer.add_batch(
            np.concatenate([np.asarray(ids, np.int64) for ids in tokens]), lengths
        )
        self.num_tokens += int(lengths.sum())
        table = np.zeros(len(documents), DOCUMENT_DTYPE)
        table["content_hash"] = [
            np.frombuffer(document.content_hash, "<u8") for document in documents
        ]
        table["source"] = [document.source for document in documents]
        table["offset"] = [document.offset for document in documents]
        table["text_bytes"] = [len(document.text.encode()) for document in documents]
        self.documents.append(table)

    def store(self, folder: StageFolder, stem: str) -> Shard:
        self.file.close()
        documents = np.concatenate(self.documents)
        with open(self.paths[1], "wb") as file:
            num_chunks = self.writer.write_index(file)
        np.save(self.paths[2], documents)
        bin_file, idx_file, docs_file = folder.store(stem, *self.paths)
        text_bytes = int(documents["text_bytes"].sum())
        return Shard(
            bin_file, idx_file, docs_file, len(documents), num_chunks, self.num_tokens, text_bytes
        )
