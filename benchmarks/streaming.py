"""Batches from joined shards, local and from an S3 server, against memory-mapped datasets.

    python benchmarks/streaming.py --chunks 100000 --batch_size 8 --seconds 30

The data of `benchmarks/samples.py`: samples of 2048 tokens, chunks of 64, two neighbors a chunk. It
is joined twice, without compression and with zstd. Its token ids are random, 15.6 bits in 16 each,
so zstd gains little; --text cuts its documents from the "text" of a JSON-lines file instead, by the
tokenizer --tokenizer. The neighbors stay random: real ones, alike, would be compressed further.

All sides take the same samples, one window after another, in turn, in one process; a round of a
streamed side ends when the window after it has come, so that what its threads do is its own. The
files are in the page cache. The last line is JSON.

* mapped: `model/samples.py` on the datasets and the KNN map.
* local_none, local_zstd: `model/streaming.py` from the local disk.
* s3_none, s3_zstd: the same from moto on loopback, a server in Python in another process that
  shares the machine's cores: its samples a second are those of the server, its CPU time is ours.

samples_per_s_per_gbit is what a network of 1 Gbit/s feeds, by the stored bytes of all samples;
read_bytes_per_sample are less where an epoch ends and blocks of the last one are still held.
"""

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, cast

import fsspec
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.samples import make_reader
from etl.storage import filesystem_of
from etl.tokenizer import load_tokenizer
from indexing.join_plan import JoinConfig
from indexing.joined import COMPRESSIONS
from indexing.joined_manifest import JoinedDataset
from model.samples import Batch, SampleReader
from model.streaming import BlockOrder, JoinedReader, StreamedSamples
from tests.plain_join import join_plainly
from tests.s3_server import s3_server

_SETTINGS = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
_BUCKET = "s3://joined"
_GBIT_BYTES = 1e9 / 8


class CountingDataset(JoinedDataset):
    """Notes the bytes of each block that was read."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.sizes: list[int] = []

    def stored(self, number: int) -> bytes:
        found = super().stored(number)
        self.sizes.append(len(found))
        return found


class Rates(NamedTuple):
    """Medians over rounds, but bytes_a_sample: of all rounds."""

    samples_per_s: float
    samples_per_cpu_s: float
    bytes_a_sample: float


class Side:
    """One way to the samples at some places."""

    def __init__(
        self, read: Callable[[int, int], Batch], samples: StreamedSamples | None = None
    ) -> None:
        self.read, self._samples = read, samples
        self._rates: list[tuple[float, float]] = []
        self._num_samples = self._bytes_before = 0

    @property
    def bytes_read(self) -> int:
        dataset = self._samples.reader.joined if self._samples else None
        return sum(dataset.sizes) if isinstance(dataset, CountingDataset) else 0

    def start(self, place: int) -> None:
        """Brings the window that begins at a place, before anything is measured."""
        if self._samples:
            self._wait(self._samples.order.find(place)[0])
        self._bytes_before = self.bytes_read

    def _wait(self, window: int) -> None:
        """Until the blocks of a window have come."""
        assert self._samples is not None
        order, reader = self._samples.order, self._samples.reader
        for future in reader.fetch(np.unique(order.window(window) // order.block).tolist()):
            future.result()

    def measure(self, first: int, stop: int, batch_size: int) -> None:
        parts = [(place, min(batch_size, stop - place)) for place in range(first, stop, batch_size)]
        wall, cpu = time.perf_counter(), time.process_time()
        for part in parts:
            self.read(*part)
        if self._samples:
            self._wait(self._samples.order.find(stop - 1)[0] + 1)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self._num_samples += stop - first
        self._rates.append(((stop - first) / wall, (stop - first) / cpu))

    def rates(self) -> Rates:
        wall, cpu = map(statistics.median, zip(*self._rates, strict=True))
        return Rates(wall, cpu, (self.bytes_read - self._bytes_before) / self._num_samples)


def mapped_side(reader: SampleReader, order: BlockOrder) -> Side:
    return Side(lambda first, count: reader.read(order.samples(first, count)))


def streamed_side(url: str, reader: SampleReader, order: BlockOrder, window_blocks: int) -> Side:
    blocks = JoinedReader(
        CountingDataset(url), reader.seq_length, reader.neighbors, 3 * window_blocks
    )
    samples = StreamedSamples(blocks, order)
    return Side(samples.read, samples)


def check(sides: dict[str, Side], num_samples: int) -> None:
    """All samples are equal, array by array."""
    first, *others = sides
    for place in range(0, num_samples, 64):
        count = min(64, num_samples - place)
        expected = sides[first].read(place, count)
        for name in others:
            found = sides[name].read(place, count)
            for field in fields(Batch):
                ours, theirs = getattr(expected, field.name), getattr(found, field.name)
                message = f"{field.name} of {name}"
                np.testing.assert_array_equal(theirs, ours, err_msg=message, strict=True)


def serve(connection: Connection, latency_s: float) -> None:
    """An S3 server whose replies come so late, until something comes."""
    import pytest

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as proxy:
        proxy.latency_s = latency_s
        connection.send({name: os.environ[name] for name in _SETTINGS})
        connection.recv()


@contextmanager
def other_process(latency_s: float = 0.0) -> Iterator[dict[str, str]]:
    """The environment in which an S3 server of another process is found."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, latency_s))
    process.start()
    try:
        yield ours.recv() | {"AWS_EC2_METADATA_DISABLED": "true"}
    finally:
        ours.send(None)
        process.join()


def join_data(folder: Path, block: int, compression: Any = "none") -> JoinedDataset:
    """The data that make_reader wrote into a folder, joined."""
    config = JoinConfig(
        dataset_url=str(folder / "train"),
        map_url=str(folder / "map"),
        retrieval_url=str(folder / "retrieval"),
        output_url=str(folder / "joined"),
        samples_per_block=block,
        blocks_per_shard=8,
        compression=compression,
    )
    return join_plainly(config)


def read_text(url: str, tokenizer_url: str) -> NDArray[np.uint16]:
    """The token ids of all texts of a JSON-lines file, one after another."""
    with fsspec.open(url, "rt", compression="infer") as file:
        texts = [json.loads(line)["text"] for line in cast(Iterable[str], file)]
    encoded = load_tokenizer(tokenizer_url).encode_batch(texts)
    return np.concatenate([text.ids for text in encoded]).astype(np.uint16)


def make_sides(
    reader: SampleReader, joined: dict[str, JoinedDataset], arguments: Any
) -> dict[str, Side]:
    window = arguments.window_blocks
    order = BlockOrder(reader.num_samples, arguments.block, window, 0)
    sides = {"mapped": mapped_side(reader, order)}
    filesystem, bucket = filesystem_of(_BUCKET)
    filesystem.mkdir(bucket)
    for compression, dataset in joined.items():
        remote = f"{_BUCKET}/{compression}"
        filesystem.put(dataset.url, remote.removeprefix("s3://"), recursive=True)
        for place, url in (("local", dataset.url), ("s3", remote)):
            sides[f"{place}_{compression}"] = streamed_side(url, reader, order, window)
    return sides


def measure(sides: dict[str, Side], size: int, batch_size: int, seconds: float) -> None:
    for side in sides.values():
        side.start(0)
    first, stop = 0, time.monotonic() + seconds
    while time.monotonic() < stop or first < 3 * size:
        for side in sides.values():
            side.measure(first, first + size, batch_size)
        first += size


def report(
    rates: dict[str, Rates], joined: dict[str, JoinedDataset], seq_length: int
) -> dict[str, Any]:
    base = rates["mapped"]
    streamed = {name: found for name, found in rates.items() if found.bytes_a_sample}
    stored = {
        name: dataset.manifest.stored_bytes / dataset.manifest.num_samples
        for name, dataset in joined.items()
    }
    per_gbit = {name: _GBIT_BYTES / size for name, size in stored.items()}
    return {
        "samples_per_s_vs_mapped": {
            name: found.samples_per_s / base.samples_per_s for name, found in streamed.items()
        },
        "samples_per_cpu_s_vs_mapped": {
            name: found.samples_per_cpu_s / base.samples_per_cpu_s
            for name, found in streamed.items()
        },
        "samples_per_s": {
            name: found.samples_per_s for name, found in (("mapped", base), *streamed.items())
        },
        "cpu_s_per_sample": {name: 1 / found.samples_per_cpu_s for name, found in rates.items()},
        "bytes_per_s": {
            name: found.samples_per_s * found.bytes_a_sample for name, found in streamed.items()
        },
        "read_bytes_per_sample": {name: found.bytes_a_sample for name, found in streamed.items()},
        "stored_bytes_per_sample": stored,
        "compression_ratio": stored["none"] / stored["zstd"],
        "samples_per_s_per_gbit": per_gbit,
        "tokens_per_s_per_gbit": {name: seq_length * rate for name, rate in per_gbit.items()},
        "equal": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--text")
    parser.add_argument("--tokenizer")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--window_blocks", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, other_process() as settings:
        os.environ |= settings
        stream = read_text(arguments.text, arguments.tokenizer) if arguments.text else None
        reader = make_reader(Path(name), arguments.chunks, arguments.shards, stream)
        joined = {c: join_data(Path(name), arguments.block, c) for c in COMPRESSIONS}
        sides = make_sides(reader, joined, arguments)
        check(sides, reader.num_samples)
        size = arguments.window_blocks * arguments.block
        measure(sides, size, arguments.batch_size, arguments.seconds)
    rates = {name: side.rates() for name, side in sides.items()}
    for side, found in rates.items():
        print(
            f"{side}: {found.samples_per_s:.0f} samples a second, {found.samples_per_cpu_s:.0f} a "
            f"CPU-second, {found.bytes_a_sample:.0f} bytes of blocks each",
            file=sys.stderr,
        )
    print(json.dumps(report(rates, joined, reader.seq_length) | vars(arguments)))


if __name__ == "__main__":
    main()
