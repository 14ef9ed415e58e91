"""Samples from joined shards (`indexing/joined.py`) by range reads, from any fsspec URL.

A block of samples with their neighbors is one request. The endless sequence visits blocks in a
seeded order and shuffles the samples of `window_blocks` consecutive blocks of that order among each
other: nearly a shuffle of everything, for reads of whole blocks. It is arithmetic, so the data
state of a run stays one number, and any number of ranks takes the same samples. The blocks of a
window are fetched by threads while the window before it is used; memory holds two windows.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from etl.cache import cached_copy
from indexing.joined import JoinedBlock
from indexing.joined_manifest import JoinedDataset
from model.sampler import permute
from model.samples import Batch, SampleError

_FETCHERS = 8
_WINDOW_SEED = 1 << 40


class BlockOrder:
    """Which sample stands at which place of the endless sequence.

    Samples of whole blocks come in the order of a permutation of blocks, those of a last block that
    is not full after them; then the samples of each window are permuted. Windows are numbered
    through all epochs.
    """

    def __init__(self, num_samples: int, block: int, window_blocks: int, seed: int) -> None:
        if num_samples < 1 or window_blocks < 1:
            raise SampleError(
                f"{num_samples} samples in windows of {window_blocks} blocks; expected 1 or more"
            )
        self.num_samples, self.block, self.seed = num_samples, block, seed
        self._size = window_blocks * block
        self._per_epoch = -(-num_samples // self._size)
        self.window = lru_cache(maxsize=4)(self._window)

    def samples(self, first: int, count: int) -> NDArray[np.int64]:
        """[count] sample numbers at places first .. first + count - 1."""
        parts = [np.empty(0, np.int64)]
        while count > 0:
            number, offset = self.find(first)
            parts.append(self.window(number)[offset : offset + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def find(self, place: int) -> tuple[int, int]:
        """The number of the window in which a place is, and where in it."""
        epoch, inside = divmod(place, self.num_samples)
        return epoch * self._per_epoch + inside // self._size, inside % self._size

    def _window(self, number: int) -> NDArray[np.int64]:
        """[n] the sample numbers of a window, in order; to be read only."""
        epoch, window = divmod(number, self._per_epoch)
        start = window * self._size
        size = min(self._size, self.num_samples - start)
        shuffled = start + permute(np.arange(size), size, self.seed + _WINDOW_SEED, number)
        blocks, rows = np.divmod(shuffled, self.block)
        num_whole = self.num_samples // self.block
        whole = blocks < num_whole
        if whole.any():
            blocks[whole] = permute(blocks[whole], num_whole, self.seed, epoch)
        return blocks * self.block + rows


class JoinedReader:
    """Batches of chosen samples; blocks are fetched by several threads at a time.

    Args:
        neighbors: Neighbors of each chunk, the first of those that were kept; 0: without any.
        held_blocks: Blocks that stay in memory, the latest used.
        use_cache: Keep blocks in the local cache too, for the other ranks of the machine.

    Raises:
        SampleError: fewer neighbors were kept than asked for, or samples of another length.
    """

    def __init__(
        self,
        joined: JoinedDataset,
        seq_length: int,
        neighbors: int,
        held_blocks: int,
        use_cache: bool = False,
    ) -> None:
        layout = joined.manifest.layout
        if seq_length != layout.seq_length or not 0 <= neighbors <= layout.neighbors:
            raise SampleError(
                f"seq_length is {seq_length} and neighbors {neighbors}; {joined.url} has samples "
                f"of {layout.seq_length} tokens with {layout.neighbors} neighbors a chunk"
            )
        self.joined, self.neighbors, self._use_cache = joined, neighbors, use_cache
        self.seq_length, self.chunk_size = layout.seq_length, layout.chunk_size
        self.num_samples, self.block_size = joined.manifest.num_samples, layout.samples_per_block
        self._pool = ThreadPoolExecutor(_FETCHERS, "blocks")
        self._held: OrderedDict[int, Future[JoinedBlock]] = OrderedDict()
        self._most, self._lock = held_blocks, threading.Lock()

    def fetch(self, blocks: Iterable[int]) -> list[Future[JoinedBlock]]:
        """Starts to fetch blocks that are not in memory."""
        with self._lock:
            found = []
            for i in blocks:
                if i not in self._held:
                    self._held[i] = self._pool.submit(self._block, i)
                self._held.move_to_end(i)
                found.append(self._held[i])
            while len(self._held) > max(self._most, len(found)):
                self._held.popitem(last=False)
        return found

    def _block(self, i: int) -> JoinedBlock:
        if not self._use_cache:
            return self.joined.block(i)
        name = sha256(f"{self.joined.manifest.fingerprint}/{i}".encode()).hexdigest()

        def download(path: Path) -> None:
            path.write_bytes(self.joined.stored(i))

        copy = cached_copy(name, self.joined.stored_bytes(i), download)
        return self.joined.decode(i, copy.read_bytes())

    def read(self, samples: ArrayLike) -> Batch:
        """The samples with these numbers [B]; equal to those of `model.samples.SampleReader`."""
        blocks, rows = np.divmod(np.asarray(samples, np.int64), self.block_size)
        numbers, owners = np.unique(blocks, return_inverse=True)
        held = [future.result() for future in self.fetch(numbers.tolist())]

        def gathered(name: str) -> NDArray[Any]:
            return _gathered([getattr(block, name) for block in held], owners, rows)

        pad = self.joined.manifest.pad_id
        sample, chunk = gathered("starts")[:, 1:].nonzero()
        neighbors = None
        if self.neighbors:
            tokens = gathered("neighbor_tokens")[:, :, : self.neighbors].astype(np.int32)
            neighbors = tokens, tokens != pad
        breaks = sample, (chunk + 1) * self.chunk_size - 1
        return Batch.of(gathered("tokens"), pad, breaks, neighbors)


def _gathered(parts: list[NDArray], owners: NDArray, rows: NDArray) -> NDArray:
    """Rows of arrays that differ in their first dimension only."""
    out = np.empty((len(rows), *parts[0].shape[1:]), parts[0].dtype)
    for i, part in enumerate(parts):
        own = owners == i
        out[own] = part[rows[own]]
    return out


class StreamedSamples:
    """The endless sequence of samples of a joined dataset, as `model.mixture.Mixture` gives it."""

    def __init__(self, reader: JoinedReader, order: BlockOrder) -> None:
        self.reader, self.order = reader, order
        self.seq_length, self.chunk_size = reader.seq_length, reader.chunk_size
        self.neighbors, self.num_samples = reader.neighbors, reader.num_samples
        self._ahead: int | None = None

    def read(self, first: int, count: int) -> Batch:
        """The samples at places first .. first + count - 1; the window after them is on its way."""
        batch = self.reader.read(self.order.samples(first, count))
        ahead = self.order.find(first + count - 1)[0] + 1
        if ahead != self._ahead:
            self.reader.fetch(np.unique(self.order.window(ahead) // self.order.block).tolist())
            self._ahead = ahead
        return batch
