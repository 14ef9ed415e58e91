"""Assembly of batches against a NeMo-like loop over chunks: samples per CPU-second.

    python benchmarks/samples.py --chunks 200000 --batch_size 8 --seconds 20

Samples of 2048 tokens, chunks of 64 and two neighbors a chunk, out of map rows with eight spare
ones; training and retrieval dataset hold the same documents, in several shards, warm in memory. All
sides take the same samples, in turn, in one run. The last line is JSON.

* ours: `model/samples.py`.
* nemo_like: the datasets merged into one file each; for each chunk of a sample its map row, for
  each of its neighbors the document that it comes from and then its tokens, one at a time; collated
  into the same batches.
* nemo_like_unbanned: the same with the first two of each row, whatever their documents, as NeMo
  takes them.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from etl.dataset import Dataset
from etl.manifest import NAME, DatasetManifest, Split
from etl.merge import MergeConfig, merge_dataset
from etl.records import Document
from etl.retmmap import Layout, RetMMapReader
from etl.shard_writer import Piece, ShardWriter
from etl.storage import StageFolder, create_json
from etl.tokenizer import Encoded
from indexing import knn_manifest
from indexing.knn_manifest import BuiltMap, open_map
from indexing.knn_map import NO_NEIGHBOR, KNNMap, write_knn_map
from model.samples import Batch, NeighborReader, SampleReader

_CHUNK_SIZE, _SEQ_LENGTH, _NEIGHBORS, _SPARE = 64, 2048, 2, 8
_VOCABULARY, _EOD, _PAD = 50258, 50256, 50257
_DOCUMENT_TOKENS, _SPREAD = 600, 0.8
_CLUSTERED, _NEAR, _WITHOUT = 0.05, 0.01, 0.01
_ROUND_BATCHES = 64


class Tokenizer(NamedTuple):
    """All that the writers of shards ask of one."""

    pad_id: int = _PAD


def make_pieces(
    chunks: int, rng: np.random.Generator, stream: NDArray[np.uint16] | None = None
) -> list[Piece]:
    """Documents of `chunks` chunks together, or a few more; of random ids, or cut from a stream of
    them. Some are in the cluster of the one before."""
    pieces: list[Piece] = []
    place = 0
    while chunks > 0:
        length = int(rng.lognormal(np.log(_DOCUMENT_TOKENS), _SPREAD)) + 1
        ids = rng.integers(0, _EOD, length).astype(np.uint16)
        if stream is not None:
            ids = stream.take(np.arange(place, place + length), mode="wrap")
            place += length
        ids[-1] = _EOD
        content_hash = rng.bytes(16)
        clustered = bool(pieces) and rng.random() < _CLUSTERED
        cluster = pieces[-1].cluster if clustered else int.from_bytes(content_hash[:8], "little")
        document = Document(0, len(pieces), "", content_hash, 4 * length)
        pieces.append(Piece(document, Encoded(ids, np.full(length, 4)), cluster))
        chunks -= length // _CHUNK_SIZE + 1
    return pieces


def write_dataset(folder: Path, split: Split, pieces: list[Piece], num_shards: int) -> Dataset:
    """The documents in equally many a shard, by the writers of jobs.prepare_data."""
    stage = StageFolder(str(folder / split))
    layout = Layout.of(_CHUNK_SIZE, np.uint16, retrieval_db=split == "retrieval")
    tokenizer: Any = Tokenizer()
    shards = []
    for i, start in enumerate(range(0, len(pieces), -(-len(pieces) // num_shards))):
        scratch = folder / f"scratch-{split}-{i}"
        writer = ShardWriter(scratch, layout, tokenizer, None, True, ["random"])
        writer.add(pieces[start : start - (-len(pieces) // num_shards)])
        shards.append(writer.store(stage, f"shard-{i}"))
    (folder / "tokenizer.json").write_text("{}")
    [stored] = stage.store("tokenizer", folder / "tokenizer.json")
    manifest = DatasetManifest(
        split=split,
        chunk_size=layout.chunk_size,
        stride=layout.stride,
        dtype_code=layout.dtype_code,
        pad_id=_PAD,
        eod_id=_EOD,
        eod_token="<|endoftext|>",
        vocab_size=_VOCABULARY,
        tokenizer=stored,
        tokenizer_fingerprint="none",
        encoder=None,
        split_rule={},
        held_back=0,
        sources=("random",),
        shards=tuple(shards),
    )
    create_json(stage.path_of(NAME), manifest.to_json())
    return Dataset(stage.url)


def write_map(
    folder: Path, training: Dataset, retrieval: Dataset, rng: np.random.Generator
) -> BuiltMap:
    """Random neighbors; some are from the same sample or beside it, and some chunks have none."""
    shape = training.num_chunks, _NEIGHBORS + _SPARE
    ids = rng.integers(0, retrieval.num_chunks, shape)
    beside = np.arange(training.num_chunks)[:, None] + rng.integers(-16, 17, shape)
    ids = np.where(rng.random(shape) < _NEAR, beside % retrieval.num_chunks, ids)
    ids[rng.random(len(ids)) < _WITHOUT] = NO_NEIGHBOR
    with open(folder / "map.knn", "wb") as file:
        write_knn_map(file, ids)
    stage = StageFolder(str(folder / "map"))
    [stored] = stage.store("map", folder / "map.knn")
    value = {
        "files": {"map": asdict(stored)},
        "training_fingerprint": training.manifest.fingerprint,
        "retrieval_fingerprint": retrieval.manifest.fingerprint,
        "k": ids.shape[1],
    }
    stage.publish(knn_manifest.NAME.removesuffix(".json"), value)
    return open_map(stage.url)


def make_reader(
    folder: Path, chunks: int, num_shards: int, stream: NDArray[np.uint16] | None = None
) -> SampleReader:
    rng = np.random.default_rng(0)
    pieces = make_pieces(chunks, rng, stream)
    training = write_dataset(folder, "train", pieces, num_shards)
    retrieval = write_dataset(folder, "retrieval", pieces, num_shards)
    built = write_map(folder, training, retrieval, rng)
    neighbors = NeighborReader.open(training, built, retrieval, _NEIGHBORS)
    for dataset in (training, retrieval):
        for i in range(len(dataset.manifest.shards)):
            reader = dataset.shard(i)[0]
            assert reader.tokens.any()
            assert reader.chunk_addresses.any()
    return SampleReader(training, _SEQ_LENGTH, neighbors)


class NemoFile:
    """A dataset merged into one pair, read chunk by chunk as NeMo's memory-mapped dataset is."""

    def __init__(self, folder: Path, dataset: Dataset) -> None:
        prefix = str(folder / f"merged-{dataset.manifest.split}")
        merge_dataset(MergeConfig(dataset.url, prefix))
        file = RetMMapReader(f"{prefix}.bin", f"{prefix}.idx")
        self._buffer = memoryview(cast(Any, file.tokens)).cast("B")
        self._addresses = np.asarray(file.chunk_addresses)
        self.first_chunk, self.num_chunks = file.first_chunk, file.num_chunks
        self.keys, self.clusters = dataset.document_keys, dataset.document_clusters
        self.dtype = file.layout.dtype
        self.width = file.chunk_size * (2 if file.retrieval_db else 1)
        assert file.tokens.any()
        assert file.chunk_addresses.any()

    def get_chunk(self, i: int) -> NDArray[Any]:
        return np.frombuffer(self._buffer, self.dtype, self.width, self._addresses[i])

    def chunk_to_doc(self, i: int) -> int:
        return int(np.searchsorted(self.first_chunk, i, side="right")) - 1


class NemoLike:
    """Batches as a dataset class makes them that returns one sample at a time."""

    def __init__(self, training: NemoFile, retrieval: NemoFile, knn_map: KNNMap, ban: bool) -> None:
        self.training, self.retrieval, self.ban = training, retrieval, ban
        self.neighbors = np.asarray(knn_map.neighbors)

    def batch(self, numbers: Iterable[int]) -> Batch:
        samples = [self.sample(number) for number in numbers]
        names = [field.name for field in fields(Batch)]
        return Batch(**{name: np.stack([sample[name] for sample in samples]) for name in names})

    def sample(self, number: int) -> dict[str, NDArray[Any]]:
        count, training = _SEQ_LENGTH // _CHUNK_SIZE, self.training
        chunks = range(number * count, min(number * count + count + 1, training.num_chunks))
        parts = [training.get_chunk(i) for i in chunks]
        missing = count + 1 - len(parts)
        parts += [np.full(_CHUNK_SIZE, _PAD, training.dtype)] * missing
        stream = np.concatenate(parts).astype(np.int64)
        tokens, labels = stream[:_SEQ_LENGTH], stream[1 : _SEQ_LENGTH + 1]
        loss_mask = (tokens != _PAD) & (labels != _PAD)
        document = training.chunk_to_doc(chunks[0])
        documents = {document}
        for place, i in enumerate(chunks[1:], 1):
            if document + 1 < len(training.first_chunk) and training.first_chunk[document + 1] == i:
                document += 1
                loss_mask[place * _CHUNK_SIZE - 1] = False
                if place < count:
                    documents.add(document)
        neighbors = self.neighbors_of(chunks[:count], documents)
        return {
            "tokens": tokens,
            "labels": labels,
            "tokens_mask": tokens != _PAD,
            "loss_mask": loss_mask,
            "neighbors": neighbors,
            "neighbors_mask": neighbors != _PAD,
        }

    def neighbors_of(self, chunks: Sequence[int], documents: set[int]) -> NDArray[np.int64]:
        """[C, K, R] tokens of the neighbors of a sample's chunks, some of which may be missing."""
        keys, clusters = self.training.keys, self.training.clusters
        banned = {int(keys[d]) for d in documents} | {int(clusters[d]) for d in documents}
        none = np.full(2 * _CHUNK_SIZE, _PAD, self.retrieval.dtype)
        found = []
        for i in chunks:
            row = self.neighbors[i]
            ids = self.allowed(row, banned) if self.ban else row[:_NEIGHBORS]
            tokens = [self.retrieval.get_chunk(id) if id >= 0 else none for id in ids]
            found.append(tokens + [none] * (_NEIGHBORS - len(tokens)))
        found += [[none] * _NEIGHBORS] * (_SEQ_LENGTH // _CHUNK_SIZE - len(found))
        return np.array(found).astype(np.int64)

    def allowed(self, row: NDArray[np.int64], banned: set[int]) -> list[int]:
        chosen = []
        for id in row:
            if id < 0:
                continue
            document = self.retrieval.chunk_to_doc(id)
            key, cluster = self.retrieval.keys[document], self.retrieval.clusters[document]
            if int(key) not in banned and int(cluster) not in banned:
                chosen.append(id)
            if len(chosen) == _NEIGHBORS:
                break
        return chosen


def assert_equal(ours: Batch, theirs: Batch, names: Iterable[str]) -> None:
    for name in names:
        a, b = getattr(ours, name), getattr(theirs, name)
        np.testing.assert_array_equal(a, b, err_msg=name)


def check(
    reader: SampleReader,
    sides: dict[str, Callable[[list[int]], Batch]],
    rng: np.random.Generator,
    count: int,
) -> None:
    """All sides give equal batches; the one without the ban has other neighbors."""
    numbers = [reader.num_samples - 1, *rng.integers(0, reader.num_samples, count).tolist()]
    ours, banned, unbanned = [side(numbers) for side in sides.values()]
    names = [field.name for field in fields(Batch)]
    assert_equal(ours, banned, names)
    assert_equal(ours, unbanned, names[:4])
    assert banned.neighbors is not None
    assert unbanned.neighbors is not None
    assert (banned.neighbors != unbanned.neighbors).any(), "the ban bans nothing"


def measure(
    sides: dict[str, Callable[[list[int]], Batch]],
    num_samples: int,
    batch_size: int,
    seconds: float,
) -> dict[str, float]:
    """Median samples per CPU-second of each side over rounds of a few batches each."""
    rng = np.random.default_rng(2)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    stop = time.monotonic() + seconds
    while time.monotonic() < stop or len(rates["ours"]) < 3:
        batches = rng.integers(0, num_samples, (_ROUND_BATCHES, batch_size)).tolist()
        for name, side in sides.items():
            start = time.process_time()
            for numbers in batches:
                side(numbers)
            rates[name].append(batch_size * len(batches) / (time.process_time() - start))
    return {name: statistics.median(found) for name, found in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--chunks", type=int, default=200_000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        reader = make_reader(Path(name), arguments.chunks, arguments.shards)
        neighbors = reader.retrieval
        assert neighbors is not None
        training = NemoFile(Path(name), reader.dataset)
        retrieval = NemoFile(Path(name), neighbors.retrieval)
        loops = [NemoLike(training, retrieval, neighbors.map, ban) for ban in (True, False)]
        sides: dict[str, Callable[[list[int]], Batch]] = {
            "ours": reader.read,
            "nemo_like": loops[0].batch,
            "nemo_like_unbanned": loops[1].batch,
        }
        check(reader, sides, np.random.default_rng(1), 256)
        rates = measure(sides, reader.num_samples, arguments.batch_size, arguments.seconds)
    for side, rate in rates.items():
        print(f"{side}: {rate:.0f} samples per CPU-second", file=sys.stderr)
    ratios = {
        f"gather_vs_{side}": rates["ours"] / rate for side, rate in rates.items() if side != "ours"
    }
    options = {name: getattr(arguments, name) for name in ("chunks", "shards", "batch_size")}
    print(json.dumps({**ratios, "samples_per_cpu_s": rates, "equal": True, **options}))


if __name__ == "__main__":
    main()
