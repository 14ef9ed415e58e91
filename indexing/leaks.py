"""Scan of a finished KNN map for neighbors that no chunk may have, in all of its places. Runs after
the map is built; between it and the trainer nothing else looks at every neighbor.

Reads the map by range requests, and each chunk of the retrieval dataset that the map names once:
keys and tokens as they are stored, not as the jobs that wrote them promise. numpy and storage only.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from etl.dataset import Dataset
from etl.manifest import HELD_OUT
from indexing.join_choice import MapRows, shard_stops
from indexing.knn_manifest import BuiltMap
from indexing.knn_map import NO_NEIGHBOR, KNNMapError

REMEDIES = {
    "own_document": "build the map again with remove_duplicate",
    "near_duplicate": "build the map again with remove_duplicate",
    "held_out": "prepare both datasets from one input, or take the documents out of the retrieval "
    "dataset, and build index and map again",
    "out_of_range": "build the map again: this one is damaged",
    "cross_document": "prepare the retrieval dataset again: its token files are damaged",
    "all_pad_neighbor": "build index and map again: chunks of pads are never indexed",
    "all_pad_chunk": "build the map again: chunks of pads have no neighbors",
}
"""Kinds of leaks, and what to do about each.

own_document: the neighbor is of the chunk's own document, by its key. near_duplicate: of another
document of the same cluster. held_out: its document's key, or cluster, is one of a held-out
dataset. out_of_range: an id that is neither -1 nor a chunk of the retrieval dataset.
cross_document: the neighbor's chunk or continuation is read with tokens of another document, or
with any but pads behind the end of its own. all_pad_neighbor: the neighbor's chunk is all pads.
all_pad_chunk: a chunk of pads has a neighbor.
"""

_SEEN, _CROSSES, _ALL_PAD = 1, 2, 4
_SHOWN_PROGRESS = 1 << 18


class LeakError(ValueError):
    """A map with neighbors that leak."""


@dataclass(frozen=True)
class Leak:
    """The first slot of a kind; places are a source's name and the byte (Parquet: the row) at which
    the document stands there. An id out of range has no place."""

    chunk_id: int
    neighbor_id: int
    chunk_place: str
    neighbor_place: str | None


@dataclass(frozen=True)
class LeakCounts:
    """What a scan found.

    Attributes:
        chunks: Rows of the map that were read.
        slots: Places for neighbors in them, K a row.
        neighbors: Those that are not -1.
        counts: Slots of each kind in REMEDIES; one slot may be of several kinds.
        examples: The first slot of each kind that occurs.
        permitted: Kinds that the map was made with (remove_duplicate=False): counted, no fault.
    """

    map_url: str
    chunks: int
    slots: int
    neighbors: int
    counts: dict[str, int]
    examples: dict[str, Leak]
    permitted: tuple[str, ...]

    @property
    def total(self) -> int:
        """Sum of the counts of the kinds that are not permitted."""
        return sum(n for kind, n in self.counts.items() if kind not in self.permitted)

    @property
    def json(self) -> dict[str, Any]:
        return {**asdict(self), "permitted": list(self.permitted), "total": self.total}

    def check(self) -> None:
        """Refuses a map with any leak that is not permitted.

        Raises:
            LeakError: with the count and the first slot of each kind, and what to do.
        """
        faults = [kind for kind, n in self.counts.items() if n and kind not in self.permitted]
        if faults:
            raise LeakError(
                f"{self.map_url}: {self.total} leaks in {self.neighbors} neighbors of "
                f"{self.chunks} chunks, expected none. {' '.join(map(self._described, faults))}"
            )

    def _described(self, kind: str) -> str:
        leak = self.examples[kind]
        place = f" ({leak.neighbor_place})" if leak.neighbor_place else ""
        return (
            f"{kind}: {self.counts[kind]}, the first is neighbor {leak.neighbor_id}{place} of "
            f"chunk {leak.chunk_id} ({leak.chunk_place}); {REMEDIES[kind]}."
        )


def scan_map(
    dataset: Dataset,
    retrieval: Dataset,
    built_map: BuiltMap,
    held_out: Sequence[Dataset] = (),
    chunk_range: tuple[int, int] | None = None,
    block: int = 1 << 13,
) -> LeakCounts:
    """Counts the leaks in all slots of a map, or of some of its chunks.

    Holds a byte for each retrieval chunk, 24 for each document and `block` rows with the tokens of
    their neighbors.

    Args:
        dataset: Whose chunks the map's rows belong to; held out itself if its split is.
        retrieval: Whose chunks the neighbors are.
        held_out: More datasets whose documents must not be neighbors, whatever their split.
        chunk_range: First chunk id and the last + 1; None: all rows of the map.
        block: Rows at a time.

    Raises:
        StorageError: the map was made for other datasets.
        KNNMapError: rows for chunks that the dataset does not have, or a chunk_range outside the
            map.
    """
    built_map.check_parents(dataset, retrieval)
    rows = MapRows(built_map)
    start, stop = _checked_range(built_map.url, rows, dataset, chunk_range)
    scan = _Scan(dataset, retrieval, held_out)
    counts, examples, neighbors = dict.fromkeys(REMEDIES, 0), {}, 0
    with tqdm(
        desc="leaks",
        total=stop - start,
        unit="chunk",
        unit_scale=True,
        file=sys.stderr,
        mininterval=2,
        disable=stop - start < _SHOWN_PROGRESS,
    ) as bar:
        for first in range(start, stop, block):
            last = min(first + block, stop)
            ids = rows.read(first - rows.chunk_start, last - rows.chunk_start)
            neighbors += int((ids != NO_NEIGHBOR).sum())
            for kind, leaks in scan.leaks(np.arange(first, last), ids).items():
                counts[kind] += int(leaks.sum())
                if kind not in examples and leaks.any():
                    row, slot = (int(places[0]) for places in leaks.nonzero())
                    examples[kind] = scan.example(first + row, int(ids[row, slot]))
            bar.update(last - first)
    allows_own = built_map.manifest.get("remove_duplicate", True) is False
    return LeakCounts(
        map_url=built_map.url,
        chunks=stop - start,
        slots=(stop - start) * rows.k,
        neighbors=neighbors,
        counts=counts,
        examples=examples,
        permitted=("own_document", "near_duplicate") if allows_own else (),
    )


def _checked_range(
    url: str, rows: MapRows, dataset: Dataset, chunk_range: tuple[int, int] | None
) -> tuple[int, int]:
    start, stop = rows.chunk_start, rows.chunk_start + rows.rows
    if stop > dataset.num_chunks:
        raise KNNMapError(
            f"{url}: rows of chunks {start}..{stop - 1}, but {dataset.url} has "
            f"{dataset.num_chunks} chunks; the map is damaged, build it again"
        )
    first, last = chunk_range or (start, stop)
    if not start <= first <= last <= stop:
        raise KNNMapError(
            f"{url}: chunk_range is {first}..{last}; expected first and last + 1 of some of its "
            f"chunks {start}..{stop - 1}"
        )
    return first, last


class _Scan:
    """The datasets of a map; what is known of each retrieval chunk's tokens is kept, a byte of bits
    a chunk."""

    def __init__(self, dataset: Dataset, retrieval: Dataset, held_out: Sequence[Dataset]) -> None:
        own = [dataset] if dataset.manifest.split in HELD_OUT else []
        for each in (dataset, retrieval, *held_out):
            each.open_all()
        self.dataset, self.retrieval = dataset, retrieval
        self._is_held_out = np.zeros(retrieval.num_documents, np.bool_)
        for each in (*own, *held_out):
            self._is_held_out |= np.isin(retrieval.document_keys, each.document_keys)
            self._is_held_out |= np.isin(retrieval.document_clusters, each.document_clusters)
        self._bits = np.zeros(retrieval.num_chunks, np.uint8)

    def leaks(
        self, chunk_ids: NDArray[np.int64], ids: NDArray[np.int64]
    ) -> dict[str, NDArray[np.bool_]]:
        """[n, K] of each kind: which neighbors ids [n, K] of chunks [n] leak."""
        dataset, retrieval = self.dataset, self.retrieval
        is_chunk = (ids >= 0) & (ids < retrieval.num_chunks)
        named, places = np.unique(ids[is_chunk], return_inverse=True)
        theirs = _documents(retrieval, named)[places]
        own = np.broadcast_to(_documents(dataset, chunk_ids)[:, None], ids.shape)[is_chunk]
        is_own = retrieval.document_keys[theirs] == dataset.document_keys[own]
        is_near = retrieval.document_clusters[theirs] == dataset.document_clusters[own]
        bits = self._bits_of(named)[places]
        found = {
            "own_document": is_own,
            "near_duplicate": is_near & ~is_own,
            "held_out": self._is_held_out[theirs],
            "cross_document": bits & _CROSSES != 0,
            "all_pad_neighbor": bits & _ALL_PAD != 0,
        }
        leaks = {kind: np.zeros(ids.shape, np.bool_) for kind in found}
        for kind, values in found.items():
            leaks[kind][is_chunk] = values
        is_there = ids != NO_NEIGHBOR
        leaks["out_of_range"] = is_there & ~is_chunk
        leaks["all_pad_chunk"] = is_there & dataset.is_all_pad(chunk_ids)[:, None]
        return leaks

    def _bits_of(self, chunk_ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        new = chunk_ids[self._bits[chunk_ids] == 0]
        pad = self.retrieval.manifest.pad_id
        left, is_misplaced = _tokens_left(self.retrieval, new)
        is_text = self.retrieval.get_chunk(new) != pad
        behind = np.arange(is_text.shape[1]) >= left[:, None]
        crosses = is_misplaced | (is_text & behind).any(axis=1)
        all_pad = ~is_text[:, : self.retrieval.chunk_size].any(axis=1)
        self._bits[new] = _SEEN + crosses * _CROSSES + all_pad * _ALL_PAD
        return self._bits[chunk_ids]

    def example(self, chunk_id: int, neighbor_id: int) -> Leak:
        is_chunk = 0 <= neighbor_id < self.retrieval.num_chunks
        place = _place(self.retrieval, neighbor_id) if is_chunk else None
        return Leak(chunk_id, neighbor_id, _place(self.dataset, chunk_id), place)


def _documents(dataset: Dataset, chunk_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """[N] document numbers of chunks [N] that exist."""
    return dataset.document_first_chunk.searchsorted(chunk_ids, side="right") - 1


def _tokens_left(
    dataset: Dataset, chunk_ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Of ascending chunks [N]: tokens [N] of the document from the chunk's first on, pads not
    counted; whether the index has another address for it than its document's place gives."""
    left, is_misplaced = np.empty(len(chunk_ids), np.int64), np.empty(len(chunk_ids), np.bool_)
    stops, layout = shard_stops(dataset), dataset.manifest.layout
    bounds = [0, *chunk_ids.searchsorted(stops).tolist()]
    for s in np.flatnonzero(np.diff(bounds)).tolist():
        part = slice(bounds[s], bounds[s + 1])
        reader, documents = dataset.shard(s)
        local = chunk_ids[part] - (stops[s] - reader.num_chunks)
        numbers = reader.chunk_to_doc(local)
        offsets = (local - reader.first_chunk[numbers]) * layout.stride
        left[part] = documents["num_tokens"][numbers] - offsets
        expected = reader.addresses[numbers] + offsets * layout.dtype.itemsize
        is_misplaced[part] = reader.chunk_addresses[local] != expected
    return left, is_misplaced


def _place(dataset: Dataset, chunk_id: int) -> str:
    """Where the document of a chunk came from."""
    stops = shard_stops(dataset)
    s = int(stops.searchsorted(chunk_id, side="right"))
    reader, documents = dataset.shard(s)
    row = documents[int(reader.chunk_to_doc(chunk_id - (stops[s] - reader.num_chunks)))]
    return f"{dataset.manifest.sources[row['source']]} at byte {row['offset']}"
