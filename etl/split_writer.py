"""What one preparation task does: read the records of a split, tokenize them, write its shard of
every dataset.

A plain idempotent function of (task, split number); Spark only schedules it. A record announces the
finished shards.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from etl.encoder_ids import EncoderTokenizer
from etl.manifest import HELD_OUT, SHARD_FILES, Split
from etl.records import Document, RecordReader, Reject
from etl.retmmap import Layout
from etl.shard_writer import Piece, ShardWriter
from etl.sources import Range
from etl.splits import Fate, SplitRule
from etl.storage import StageFolder, StorageError, StoredFile, read_bytes, scratch_folder
from etl.tokenizer import Encoded, TextTokenizer, restore_tokenizer

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 4096
_REASONS = 100


@lru_cache(maxsize=1)
def _restored(data: bytes, eod_token: str) -> TextTokenizer:
    """One for all tasks of a worker process: it takes a second to build."""
    return restore_tokenizer(data, eod_token)


@dataclass(frozen=True)
class SplitTask:
    """Everything a task needs besides the number of its split; picklable."""

    folder: StageFolder
    reader: RecordReader
    splits: tuple[tuple[Range, ...], ...]
    tokenizer_data: bytes
    eod_token: str
    encoder: EncoderTokenizer | None
    rule: SplitRule
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

    @property
    def tokenizer(self) -> TextTokenizer:
        return _restored(self.tokenizer_data, self.eod_token)

    def records(self, index: int) -> Iterator[Document | Reject]:
        return self.reader.read(self.splits[index])

    def documents(self, index: int) -> Iterator[tuple[int, Document]]:
        """(number in the split, document) of the split's usable records."""
        found = (record for record in self.records(index) if isinstance(record, Document))
        return enumerate(found)

    def store_fates(self, index: int, fates: Mapping[int, Fate]) -> StoredFile:
        """Stores what duplicate detection found about documents of a split, by number in it."""
        rows = [
            [ordinal, fate.reason, fate.cluster_hash.hex(), fate.is_held_out, fate.has_assigned]
            for ordinal, fate in sorted(fates.items())
        ]
        with scratch_folder(self.folder.url) as scratch:
            path = scratch / "fates.json"
            path.write_text(json.dumps(rows))
            [stored] = self.folder.store(f"fates/{index:05d}", path)
        return stored

    def stored_fates(self, file: StoredFile | None) -> dict[int, Fate]:
        """What `store_fates` stored; nothing for a split without.

        Raises:
            StorageError: the file is damaged.
        """
        if file is None:
            return {}
        data = read_bytes(self.folder.path_of(file.name))
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise StorageError(f"{self.folder.path_of(file.name)}: damaged; run the job again")
        return {
            ordinal: Fate(reason, bytes.fromhex(cluster), is_held_out, has_assigned)
            for ordinal, reason, cluster, is_held_out, has_assigned in json.loads(data)
        }

    def run(
        self,
        index: int,
        fates: StoredFile | None,
        progress: Callable[[dict[str, int]], None],
    ) -> str | None:
        """`write`, unless an earlier attempt or another run has finished the split meanwhile."""
        finished = self.folder.record(self.record_name(index))
        if finished is None:
            return self.write(index, self.stored_fates(fates), progress)
        progress(finished["counts"])
        return None

    def write(
        self,
        index: int,
        fates: Mapping[int, Fate],
        progress: Callable[[dict[str, int]], None] = lambda _: None,
    ) -> str | None:
        """Writes the split and publishes its record; `fates` by number in the split are what
        duplicate detection found.

        Returns None, or with fail_on_bad_record the description of the first bad record (then
        nothing is published).
        """
        with scratch_folder(self.folder.url) as scratch:
            writer = _SplitWriter(self, scratch)
            ordinal = -1
            for record in self.records(index):
                if isinstance(record, Document):
                    ordinal += 1
                    writer.add(record, fates.get(ordinal))
                elif self.fail_on_bad_record:
                    place = f"{self.reader.sources[record.source].url} at byte {record.offset}"
                    return f"{place}: {record.reason}"
                else:
                    writer.reject(record)
            value = writer.finish(f"{index:05d}")
            progress(value["counts"])
            self.folder.publish(self.record_name(index), value)
        return None


class _SplitWriter:
    """Documents in, shards of up to four datasets out."""

    def __init__(self, task: SplitTask, scratch: Path) -> None:
        self.task, self.scratch = task, scratch
        self.shards: dict[Split, ShardWriter] = {}
        self.batch: list[tuple[Document, Split, Fate | None]] = []
        self.batch_characters = 0
        self.counts: Counter[str] = Counter()
        self.rejects: IO[str] | None = None
        self.reject_reasons: Counter[str] = Counter()

    def add(self, document: Document, fate: Fate | None) -> None:
        if fate is not None and fate.reason:
            self.counts[fate.reason] += 1
            return
        split = self.task.rule.split_of(document, fate)
        self.counts["documents"] += 1
        self.counts["text_bytes"] += document.text_bytes
        self.counts["held_out"] += split in HELD_OUT
        self.batch.append((document, split, fate))
        self.batch_characters += len(document.text)
        if self.batch_characters >= _BATCH_CHARACTERS or len(self.batch) >= _BATCH_DOCUMENTS:
            self._flush()

    def reject(self, reject: Reject) -> None:
        """Lists a record that is skipped."""
        if self.rejects is None:
            self.rejects = open(self.scratch / "rejects.jsonl", "w")  # noqa: SIM115
        place = {"file": self.task.reader.sources[reject.source].url, "offset": reject.offset}
        self.rejects.write(json.dumps({**place, "reason": reject.reason}) + "\n")
        is_known = reject.reason in self.reject_reasons or len(self.reject_reasons) < _REASONS
        self.reject_reasons[reject.reason if is_known else "other reasons"] += 1

    def _flush(self) -> None:
        encoded = self._encode([document.text for document, _, _ in self.batch])
        pieces: dict[Split, list[Piece]] = {}
        for (document, split, fate), tokens in zip(self.batch, encoded, strict=True):
            cluster = document.content_hash if fate is None else fate.cluster_hash
            piece = Piece(document, tokens, int.from_bytes(cluster[:8], "little"))
            self.counts["tokens"] += len(tokens.ids)
            if split != "retrieval":
                pieces.setdefault(split, []).append(piece)
            if self.task.retrieval is not None:
                if self.task.rule.is_held_back(split, fate):
                    self.counts["held_back"] += 1
                else:
                    pieces.setdefault("retrieval", []).append(piece)
        for split, chosen in pieces.items():
            self._shard(split).add(chosen)
        self.batch, self.batch_characters = [], 0

    def _encode(self, texts: list[str]) -> list[Encoded]:
        tokenizer = self.task.tokenizer
        end = tokenizer.eod_id if self.task.append_eod else None
        encoded = tokenizer.encode_batch(texts)
        return _stored_form(encoded, end, self.task.training.dtype, tokenizer.vocab_size)

    def _shard(self, split: Split) -> ShardWriter:
        if split not in self.shards:
            self.shards[split] = ShardWriter(
                self.scratch / split,
                self.task.layout_of(split),
                self.task.tokenizer,
                self.task.encoder,
                self.task.nemo_padding,
                [source.name for source in self.task.reader.sources],
            )
        return self.shards[split]

    def finish(self, stem: str) -> dict[str, Any]:
        """Stores the shards and the rejects; the split's record."""
        if self.batch:
            self._flush()
        shards = {
            split: asdict(writer.store(StageFolder(self.task.folder.path_of(split)), stem))
            for split, writer in self.shards.items()
        }
        files = {
            f"{split}.{part}": shard[part] | {"name": f"{split}/{shard[part]['name']}"}
            for split, shard in shards.items()
            for part in SHARD_FILES
            if shard[part]
        }
        if self.rejects is not None:
            self.rejects.close()
            path = self.scratch / "rejects.jsonl"
            files["rejects"] = asdict(self.task.folder.store(f"rejects/{stem}", path)[0])
        return {
            "shards": shards,
            "files": files,
            "counts": {**self.counts, "skipped": self.reject_reasons.total()},
            "reject_reasons": dict(self.reject_reasons),
        }


def _stored_form(
    encoded: list[Encoded], end: int | None, dtype: np.dtype[Any], vocab_size: int
) -> list[Encoded]:
    """The same with an end-of-document token, which stands for no bytes, and ids in the dtype that
    is stored: checked and converted once, as views of two arrays."""
    ends = [] if end is None else [np.asarray([end], np.int32)]
    none = np.zeros(len(ends), encoded[0].byte_lengths.dtype)
    ids = np.concatenate([array for part in encoded for array in (part.ids, *ends)])
    lengths = np.concatenate([array for part in encoded for array in (part.byte_lengths, none)])
    if len(ids) and ids.view(np.uint32).max() >= vocab_size:
        raise RuntimeError(f"the tokenizer gave an id beyond its vocabulary of {vocab_size}")
    ids = ids.astype(dtype)
    stops = np.cumsum([len(part.ids) + len(ends) for part in encoded]).tolist()
    return [
        Encoded(ids[start:stop], lengths[start:stop])
        for start, stop in zip([0, *stops[:-1]], stops, strict=True)
    ]
