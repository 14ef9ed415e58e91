"""One task's work in the join of training chunks with their neighbors' tokens; knows no engine.

    requests   shard of samples -> (retrieval shard, chunk id, slot) of every neighbor it keeps
    source     chunk ids -> payloads: tokens with continuation, document key and cluster, chunk id
    write      shard of samples, payloads by slot -> stored shard, record

The slot of a neighbor is its place among all of the shard's: (sample, chunk, place among the K),
counted from the shard's first sample.
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from etl.dataset import Dataset
from etl.storage import StageFolder, StoredFile, scratch_folder
from indexing.join_choice import DocumentKeys, MapRows, kept_neighbors, shard_stops, store_documents
from indexing.joined import JoinedBlock, JoinedError, JoinedLayout, JoinedShardWriter
from indexing.joined_manifest import JoinedManifest, JoinedShard
from indexing.knn_manifest import BuiltMap
from indexing.knn_map import NO_NEIGHBOR

START_SLOT = -1
"""Slot that comes first in every shard. Its "chunk id" is -1 - n, n the number of neighbors that
follow: shards without any are written too, and one whose payloads were torn apart is noticed."""
_KEY_BYTES, _ID_BYTES = 16, 8
_REQUEST_ROWS = 1 << 16


class Requests(NamedTuple):
    """Neighbors [n]: retrieval shard, chunk id and slot."""

    retrieval_shards: NDArray[np.int32]
    chunks: NDArray[np.int64]
    slots: NDArray[np.int64]


class Payloads(NamedTuple):
    """slots [n] and their payloads u8[n, payload_bytes]."""

    slots: NDArray[np.int64]
    rows: NDArray[np.uint8]


@dataclass(frozen=True)
class JoinTask:
    """What the tasks of one join share; picklable, a copy opens its own files.

    parents: fields of the manifest that do not depend on shards.
    """

    folder: StageFolder
    dataset_url: str
    retrieval_url: str
    map: BuiltMap
    layout: JoinedLayout
    num_samples: int
    parents: dict[str, Any]

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.layout.samples_per_shard)

    @property
    def token_bytes(self) -> int:
        """Of one neighbor."""
        return 2 * self.layout.chunk_size * self.layout.dtype.itemsize

    @property
    def payload_bytes(self) -> int:
        return self.token_bytes + _KEY_BYTES + _ID_BYTES

    def record_name(self, i: int) -> str:
        return f"shard-{i:06d}"

    def documents_name(self, i: int) -> str:
        return f"documents-{i:06d}"

    def store_documents(self, i: int) -> dict[str, Any]:
        """The record of the document table of retrieval shard i."""
        name = self.documents_name(i)
        return store_documents(self.folder, name, Dataset(self.retrieval_url), i)

    def samples_of(self, i: int) -> range:
        step = self.layout.samples_per_shard
        return range(i * step, min((i + 1) * step, self.num_samples))

    def requests(self, i: int, documents: list[StoredFile]) -> Iterator[Requests]:
        """Every neighbor that shard i keeps, in the order of slots, then the start slot; in bounded
        parts. `documents` are the tables of all retrieval shards."""
        retrieval, training = Dataset(self.retrieval_url), Dataset(self.dataset_url)
        map_rows, stops = MapRows(self.map), shard_stops(retrieval)
        document_keys = DocumentKeys(self.folder, documents, retrieval)
        count, samples = 0, self.samples_of(i)
        step = max(1, _REQUEST_ROWS // (self.layout.chunks * map_rows.k))
        for first in range(samples.start, samples.stop, step):
            part = range(first, min(first + step, samples.stop))
            ids = self._candidates(map_rows, part)
            keys = np.zeros((*ids.shape, 2), np.uint64)
            keys[ids != NO_NEIGHBOR] = document_keys.of(ids[ids != NO_NEIGHBOR])
            own = training.chunk_keys(self._existing(training, part)[0][:, :-1])
            chosen = kept_neighbors(ids, keys, own, self.layout.neighbors).ravel()
            places = np.flatnonzero(chosen != NO_NEIGHBOR)
            shards = stops.searchsorted(chosen[places], side="right").astype(np.int32)
            yield Requests(shards, chosen[places], places + self._first_slot(samples, first))
            count += len(places)
        start = np.asarray([START_SLOT])
        yield Requests(np.zeros(1, np.int32), np.asarray([-1 - count]), start)

    def _first_slot(self, samples: range, sample: int) -> int:
        return (sample - samples.start) * self.layout.chunks * self.layout.neighbors

    def _candidates(self, map_rows: MapRows, samples: range) -> NDArray[np.int64]:
        """[b, C, k] the map's rows of the samples' chunks; -1 beyond the dataset."""
        chunks = self.layout.chunks
        ids = np.full((len(samples) * chunks, map_rows.k), NO_NEIGHBOR)
        found = map_rows.read(samples.start * chunks, samples.stop * chunks)
        ids[: len(found)] = found
        return ids.reshape(len(samples), chunks, map_rows.k)

    def _existing(
        self, training: Dataset, samples: range
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """[b, C + 1] the samples' chunks, the last one repeated beyond the dataset; and which are
        in it."""
        firsts = np.asarray(samples, np.int64)[:, None] * self.layout.chunks
        chunks = firsts + np.arange(self.layout.chunks + 1)
        return np.minimum(chunks, training.num_chunks - 1), chunks < training.num_chunks

    def write(self, i: int, payloads: Iterator[Payloads]) -> dict[str, Any]:
        """Writes, stores and publishes shard i from its payloads in the order of slots.

        Raises:
            JoinedError: payloads that are not those that were asked for.
        """
        samples, training = self.samples_of(i), Dataset(self.dataset_url)
        stream = _PayloadStream(payloads, self.payload_bytes, i)
        with scratch_folder(self.folder.url) as scratch:
            data, index = scratch / "shard.joined", scratch / "shard.idx"
            with open(data, "wb") as file:
                writer = JoinedShardWriter(file, self.layout, samples.start, len(samples))
                for first in samples[:: self.layout.samples_per_block]:
                    part = range(first, min(first + self.layout.samples_per_block, samples.stop))
                    found = stream.take(self._first_slot(samples, part.stop))
                    slots = found.slots - self._first_slot(samples, first)
                    writer.add(self._block(training, part, Payloads(slots, found.rows)))
            stream.check_end()
            writer.write_index(index)
            files = zip(("data", "index"), self.folder.store(self.record_name(i), data, index))
        value = {
            "files": {name: asdict(file) for name, file in files},
            "first_sample": samples.start,
            "num_samples": len(samples),
        }
        return self.folder.publish(self.record_name(i), value)

    def example(self) -> JoinedBlock:
        """The block in the middle, to measure what compression gains. Its neighbors are chunks of
        one retrieval shard instead of the map's: those would be in as many shards, all of which
        would be fetched."""
        size = self.layout.samples_per_block
        first = self.num_samples // size // 2 * size
        samples = range(first, min(first + size, self.num_samples))
        ids = self._candidates(MapRows(self.map), samples)[..., : self.layout.neighbors].ravel()
        slots = np.flatnonzero(ids != NO_NEIGHBOR)
        rows = np.empty((len(slots), self.payload_bytes), np.uint8)
        if len(slots):
            sizes = [s.num_chunks for s in Dataset(self.retrieval_url).manifest.shards]
            largest = int(np.argmax(sizes))
            chunks = sum(sizes[:largest]) + ids[slots] % sizes[largest]
            order = chunks.argsort()
            rows[order] = PayloadSource(self).read(chunks[order])
        return self._block(Dataset(self.dataset_url), samples, Payloads(slots, rows))

    def _block(self, training: Dataset, samples: range, payloads: Payloads) -> JoinedBlock:
        """The block of samples with the neighbors' payloads; slots count from the block's first."""
        layout, count, pad = self.layout, len(samples), self.parents["pad_id"]
        existing, inside = self._existing(training, samples)
        tokens = training.get_chunk(existing.ravel()).reshape(count, layout.chunks + 1, -1)
        tokens[~inside] = pad
        arrays = layout.arrays(count)
        ids, keys, neighbor_tokens = (
            np.full(arrays[name][1], fill, arrays[name][0])
            for name, fill in (
                ("neighbor_ids", NO_NEIGHBOR),
                ("neighbor_keys", 0),
                ("neighbor_tokens", pad),
            )
        )
        slots, rows = payloads
        parts = np.split(rows, [self.token_bytes, self.token_bytes + _KEY_BYTES], axis=1)
        for array, part in zip((neighbor_tokens, keys, ids), parts):
            values = np.ascontiguousarray(part).view(array.dtype)
            array.reshape(ids.size, -1)[slots] = values
        own = training.chunk_keys(existing[:, :-1])
        return JoinedBlock(
            tokens=tokens.reshape(count, -1)[:, : layout.seq_length + 1],
            starts=(_starts(training, existing) & inside).astype(np.uint8),
            keys=np.where(inside[:, :-1, None], own, np.uint64(0)),
            neighbor_ids=ids,
            neighbor_keys=keys,
            neighbor_tokens=neighbor_tokens,
        )

    def manifest(self, records: list[dict[str, Any]]) -> JoinedManifest:
        """The manifest of all shards' records, in order."""
        plain = [record["files"] | record for record in records]
        return JoinedManifest(
            layout=self.layout,
            num_samples=self.num_samples,
            shards=tuple(map(JoinedShard.from_json, plain)),
            **self.parents,
        )


class PayloadSource:
    """Payloads of neighbors. Retrieval shards are opened on first use and, with chunk ids that
    ascend from one `read` to the next, held no longer than needed."""

    def __init__(self, task: JoinTask) -> None:
        self._task, self._closed = task, Dataset(task.retrieval_url)
        self._opened, self._last_shard = copy.copy(self._closed), -1
        self._stops = shard_stops(self._closed)

    def read(self, chunks: NDArray[np.int64]) -> NDArray[np.uint8]:
        """u8[n, payload_bytes] of ascending chunk ids [n]; of negative ones, only the id."""
        rows = np.zeros((len(chunks), self._task.payload_bytes), np.uint8)
        rows[:, -_ID_BYTES:] = np.ascontiguousarray(chunks, "<i8")[:, None].view(np.uint8)
        present = chunks >= 0
        if present.any():
            unique, places = np.unique(chunks[present], return_inverse=True)
            rows[present, :-_ID_BYTES] = self._contents(unique)[places]
            last_shard = int(self._stops.searchsorted(unique[-1], side="right"))
            if last_shard != self._last_shard:
                self._opened, self._last_shard = copy.copy(self._closed), last_shard
        return rows

    def _contents(self, chunks: NDArray[np.int64]) -> NDArray[np.uint8]:
        tokens = self._opened.get_chunk(chunks)
        keys = self._opened.chunk_keys(chunks)
        return np.concatenate([tokens.view(np.uint8), keys.view(np.uint8)], axis=1)


class _PayloadStream:
    """A shard's payloads in the order of slots, taken in parts of other sizes than they come in.

    Raises:
        JoinedError: the shard's start does not come first.
    """

    def __init__(self, payloads: Iterator[Payloads], width: int, shard: int) -> None:
        self._payloads, self._shard, self._taken = payloads, shard, 0
        self._left = Payloads(np.empty(0, np.int64), np.empty((0, width), np.uint8))
        start = self.take(START_SLOT + 1)
        if start.slots.tolist() != [START_SLOT]:
            raise self._error(f"slots {start.slots[:3]}", f"the start, {START_SLOT}")
        self._count = -1 - int(start.rows[0, -_ID_BYTES:].view("<i8")[0])
        self._taken = 0

    def take(self, stop: int) -> Payloads:
        """The payloads of the next slots before `stop`.

        Raises:
            JoinedError: slots that do not ascend.
        """
        parts = [self._left]
        while not len(parts[-1].slots) or parts[-1].slots[-1] < stop:
            part = next(self._payloads, None)
            if part is None:
                break
            parts.append(part)
        slots, rows = parts[0]
        if len(parts) > 1:
            slots = np.concatenate([part.slots for part in parts])
            rows = np.concatenate([part.rows for part in parts])
        count = int((slots < stop).sum())
        if (slots[1:] <= slots[:-1]).any():
            raise self._error("slots that do not ascend", "each once, in order")
        self._left = Payloads(slots[count:], rows[count:])
        self._taken += count
        return Payloads(slots[:count], rows[:count])

    def check_end(self) -> None:
        """Raises JoinedError unless all payloads came, and no more."""
        surplus = len(self._left.slots) + sum(len(part.slots) for part in self._payloads)
        if surplus or self._taken != self._count:
            raise self._error(f"{self._taken + surplus} payloads", f"{self._count}")

    def _error(self, found: str, expected: str) -> JoinedError:
        return JoinedError(
            f"shard {self._shard} of the join: found {found}, expected {expected}; the shuffle "
            "lost, repeated or tore apart a shard's payloads: run the job again"
        )


def _starts(training: Dataset, chunks: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each chunk [b, C + 1] is the first of its document."""
    documents = training.chunk_to_doc(chunks.ravel())
    before = training.chunk_to_doc(np.maximum(chunks.ravel() - 1, 0))
    return ((documents != before) | (chunks.ravel() == 0)).reshape(chunks.shape)
