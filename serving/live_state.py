"""The durable state of live documents: a folder on any fsspec URL that a killed process leaves
whole.

    batches/batch-HASH.documents.jsonl   documents, a JSON object a line
    batches/batch-HASH.vectors.npy       fp16 [chunks, dimension], the embeddings of their chunks
    epochs/000002.json                   begins epoch 2: what the documents were made with, and the
                                         batch that the epoch starts with, if any
    adds/000002-000017.json              appends a batch, the 18th of epoch 2

Records are create-only and name batches by sha256; the highest epoch is in force. So a reset, and
joining many small batches to one, is one new epoch record, an add is one new add record, and both
happened or did not. One process at a time writes; a second one is noticed, and refused, at the
latest after its first record.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from etl.deadline import RemoteError
from etl.npy_file import write_npy
from etl.storage import (
    StageFolder,
    StorageError,
    StoredFile,
    content_key,
    create_json,
    filesystem_of,
    join_url,
    read_json,
    scratch_folder,
)

log = logging.getLogger(__name__)

FORMAT = "retromill-live-documents"
VERSION = 1
_JOINED_ADDS = 32
_OWN = re.compile(
    r"epochs/(?P<epoch>\d{6})\.json|adds/(?P<of>\d{6})-(?P<number>\d{6})\.json"
    r"|batches/batch-[0-9a-f]+\.(documents\.jsonl|vectors\.npy)"
)


@dataclass(frozen=True)
class StoredBatch:
    """Documents as plain JSON objects, and the vectors [chunks, dimension] of all their chunks."""

    documents: Sequence[dict[str, Any]]
    vectors: NDArray[np.float16]


class LiveState:
    """One folder of live documents.

    Args:
        identity: What the documents are made with: plain values that must stay the same.
    """

    def __init__(self, url: str, identity: dict[str, Any]) -> None:
        self.folder = StageFolder(url)
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._epoch = self._adds = 0

    def load(self) -> list[StoredBatch]:
        """Everything that is stored, in the order it was added; begins epoch 0 in a new folder.

        Raises:
            StorageError: the state is damaged or incomplete, or was made with something else.
        """
        self.folder.remove_scratch()
        epochs, adds = self._numbers()
        if not epochs:
            if adds:
                raise self._damaged("holds adds, but no epoch record")
            self.begin(None)
            return []
        self._epoch = max(epochs)
        numbers = sorted(number for epoch, number in adds if epoch == self._epoch)
        if numbers != list(range(len(numbers))) or max(adds, default=(0,))[0] > self._epoch:
            raise self._damaged(f"epoch {self._epoch} has adds {numbers}; records are missing")
        self._adds = len(numbers)
        first = self._record(_epoch_name(self._epoch))
        self._check_identity(first["identity"])
        records = [first, *(self._record(_add_name(self._epoch, i)) for i in numbers)]
        batches = [self._read(record["batch"]) for record in records if record["batch"]]
        if len(numbers) > _JOINED_ADDS:
            batches = [_joined(batches)]
            self.replace(batches[0])
        return batches

    def begin(self, batch: StoredBatch | None) -> None:
        """Begins epoch 0 in a folder without state.

        Raises:
            StorageError: the folder holds state.
        """
        if self._numbers()[0] or not self._publish_epoch(0, batch):
            raise StorageError(
                f"{self.folder.url} holds live documents already; name another folder"
            )

    def append(self, batch: StoredBatch) -> None:
        """Durable when it returns. When it raises, the batch may be there or not, whole.

        Raises:
            StorageError: another process writes to the folder.
            OSError: the storage failed.
        """
        name = _add_name(self._epoch, self._adds)
        if not self._publish(name, {"batch": self._store(batch)}) or self._is_replaced():
            raise self._other_writer(name)
        self._adds += 1

    def replace(self, batch: StoredBatch | None) -> None:
        """Forgets everything, in favor of `batch`; durable when it returns.

        Raises:
            StorageError: another process writes to the folder.
            OSError: the storage failed.
        """
        epoch = self._epoch + 1
        if not self._publish_epoch(epoch, batch):
            raise self._other_writer(_epoch_name(epoch))
        self._epoch, self._adds = epoch, 0
        try:
            self._remove_former()
        except OSError as error:
            log.warning("%s: former documents were not deleted: %s", self.folder.url, error)

    def _remove_former(self) -> None:
        """Deletes what the epoch in force does not need."""
        name = _epoch_name(self._epoch)
        stored = self._record(name)["batch"]
        needed = {
            f"{name}.json",
            *(f["name"] for f in (stored["files"].values() if stored else [])),
        }
        filesystem, path = filesystem_of(self.folder.url)
        for found in self._names():
            if found not in needed:
                filesystem.rm_file(join_url(path, found))

    def _publish_epoch(self, epoch: int, batch: StoredBatch | None) -> bool:
        stored = None if batch is None else self._store(batch)
        return self._publish(_epoch_name(epoch), {"identity": self.identity, "batch": stored})

    def _publish(self, name: str, value: dict[str, Any]) -> bool:
        """Whether the record is there as this call published it; a failed request counts if only
        its reply was lost."""
        value = {"format": FORMAT, "version": VERSION, **value}
        value["fingerprint"] = content_key(value)
        try:
            if create_json(self.folder.path_of(f"{name}.json"), value):
                return True
        except RemoteError:
            with suppress(FileNotFoundError, StorageError):
                if self._record(name) == value:
                    return True
            raise
        return self._record(name) == value

    def _is_replaced(self) -> bool:
        """Whether another process began an epoch after this one's."""
        next_epoch = f"{_epoch_name(self._epoch + 1)}.json"
        filesystem, path = filesystem_of(self.folder.path_of(next_epoch))
        filesystem.invalidate_cache()
        return bool(filesystem.exists(path))

    def _store(self, batch: StoredBatch) -> dict[str, Any]:
        with scratch_folder(self.folder.url) as scratch:
            paths = [scratch / "batch.documents.jsonl", scratch / "batch.vectors.npy"]
            lines = [json.dumps(document) for document in batch.documents]
            paths[0].write_text("".join(f"{line}\n" for line in lines))
            write_npy(paths[1], batch.vectors)
            documents, vectors = self.folder.store("batches/batch", *paths)
        files = {"documents": asdict(documents), "vectors": asdict(vectors)}
        return {"files": files, "documents": len(lines), "chunks": len(batch.vectors)}

    def _read(self, entry: dict[str, Any]) -> StoredBatch:
        documents, vectors = (
            self.folder.fetch_verified(StoredFile(**entry["files"][name]))
            for name in ("documents", "vectors")
        )
        batch = StoredBatch(list(_lines(documents)), np.load(vectors, allow_pickle=False))
        found = (len(batch.documents), len(batch.vectors), batch.vectors.dtype)
        expected = (entry["documents"], entry["chunks"], np.dtype(np.float16))
        if found != expected:
            raise self._damaged(f"{documents}: found {found}, its record says {expected}")
        return batch

    def _names(self) -> list[str]:
        """Names of everything in the folder that is part of a state, or was."""
        filesystem, path = filesystem_of(self.folder.url)
        filesystem.invalidate_cache()
        root = path.rstrip("/") + "/"
        names = [name.removeprefix(root) for name in cast(list[str], filesystem.find(path))]
        return [name for name in names if _OWN.fullmatch(name)]

    def _numbers(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Numbers of the epochs, and (epoch, number) of the adds."""
        matches = [match for name in self._names() if (match := _OWN.fullmatch(name))]
        epochs = [int(match["epoch"]) for match in matches if match["epoch"]]
        return epochs, [(int(m["of"]), int(m["number"])) for m in matches if m["of"]]

    def _record(self, name: str) -> dict[str, Any]:
        url = self.folder.path_of(f"{name}.json")
        found = read_json(url)
        known = (found.get("format"), found.get("version")) if isinstance(found, dict) else found
        if known != (FORMAT, VERSION):
            raise StorageError(
                f"{url}: format and version are {known}, this code reads {(FORMAT, VERSION)}"
            )
        content = {key: value for key, value in found.items() if key != "fingerprint"}
        if content_key(content) != found.get("fingerprint"):
            raise self._damaged(f"{name}.json does not match its fingerprint")
        return found

    def _check_identity(self, found: dict[str, Any]) -> None:
        names = sorted(found.keys() | self.identity.keys())
        differing = [name for name in names if found.get(name) != self.identity.get(name)]
        if differing:
            shown = [f"{n}: {found.get(n)} there, {self.identity.get(n)} here" for n in differing]
            raise StorageError(
                f"{self.folder.url} holds live documents that were made otherwise ("
                f"{'; '.join(shown)}); name another folder, and add the documents again"
            )

    def _damaged(self, what: str) -> StorageError:
        return StorageError(
            f"{self.folder.url}: the saved live documents are damaged: {what}; restore the folder "
            "from a copy, or name another and add the documents again"
        )

    def _other_writer(self, name: str) -> StorageError:
        return StorageError(
            f"{self.folder.url}: another process wrote there ({name} or a later record is not of "
            "this one), or an earlier write arrived although its reply was lost; give each server "
            "a folder of its own, or restart this one to go on from what is stored"
        )


def _epoch_name(epoch: int) -> str:
    return f"epochs/{epoch:06d}"


def _add_name(epoch: int, number: int) -> str:
    return f"adds/{epoch:06d}-{number:06d}"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _joined(batches: Sequence[StoredBatch]) -> StoredBatch:
    documents = [document for batch in batches for document in batch.documents]
    return StoredBatch(documents, np.concatenate([batch.vectors for batch in batches]))
