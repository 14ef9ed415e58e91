"""Shards of a joined dataset: training samples with the tokens of their neighbors, in order.

Written by the join job, read by trainers by range requests through `joined_manifest.py`. numpy,
xxhash and zstandard only. S seq_length, c chunk_size, C = S / c, K neighbors kept a chunk;
all integers are little-endian.

    shard  offset  type      field
           0       8 bytes   b"RETJOIN\\0"
           8       u32       version = 1
           12      u32       dtype code of tokens (etl/retmmap.py)
           16      u32       S
           20      u32       c
           24      u32       K
           28      u32       samples a block
           32      u64       number of the first sample
           40      u64       number of samples
           48      u32       compression: 0 none, 1 zstd (one frame a block)
           52      12 bytes  0
           64      blocks, one after another

    .idx   0       8 bytes   b"RETJIDX\\0"
           8       u32       version = 1
           12      u32       0
           16      u64       number of the shard's first sample
           24      u64       number of blocks N
           32      u64[N+1]  byte offset of each block in the shard, then the shard's size
                   u64[N]    xxh64 (seed 0) of each block's bytes as stored

    block of b samples, without gaps
           tokens           dtype[b, S+1]       tokens and last label; pads beyond the dataset
           starts           u8[b, C+1]          1: the chunk starts a document; 0 beyond the dataset
           keys             u64[b, C, 2]        document key and cluster; 0 beyond the dataset
           neighbor_ids     i64[b, C, K]        chunk ids, best first, then -1
           neighbor_keys    u64[b, C, K, 2]     as keys; 0 where missing
           neighbor_tokens  dtype[b, C, K, 2c]  with their continuation; pads where missing

Neighbors are the first K of the map's row that the ban of the sample allows (every document of the
sample and its cluster of near-duplicates), so the first K' <= K are what K' neighbors would be.
Blocks of a shard are full but for the last block of the dataset.
"""

import struct
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from etl.retmmap import DTYPES

MAGIC, INDEX_MAGIC = b"RETJOIN\x00", b"RETJIDX\x00"
VERSION = 1
HEADER = struct.Struct("<8sIIIIIIQQI12x")
INDEX_HEADER = struct.Struct("<8sI4xQQ")
COMPRESSIONS: tuple[str, ...] = ("none", "zstd")
Compression = Literal["none", "zstd"]


class JoinedError(ValueError):
    """A joined dataset that is not what its headers, checksums or manifest promise."""


@dataclass(frozen=True)
class JoinedLayout:
    """What determines the bytes besides the samples: `neighbors` is K, `level` is zstd's.

    Raises:
        JoinedError: sizes that fit no block.
    """

    seq_length: int
    chunk_size: int
    neighbors: int
    dtype_code: int
    samples_per_block: int
    blocks_per_shard: int
    compression: Compression = "none"
    level: int = 3

    def __post_init__(self) -> None:
        counts = ("seq_length", "chunk_size", "neighbors", "samples_per_block", "blocks_per_shard")
        for name in counts:
            if not 1 <= getattr(self, name) < 1 << 32:
                raise JoinedError(f"{name} is {getattr(self, name)}; expected 1 to 2^32 - 1")
        if self.seq_length % self.chunk_size:
            raise JoinedError(
                f"seq_length {self.seq_length} is not a multiple of chunk_size {self.chunk_size}"
            )
        if self.dtype_code not in DTYPES:
            raise JoinedError(f"dtype code {self.dtype_code}; expected one of {sorted(DTYPES)}")
        if self.compression not in COMPRESSIONS:
            raise JoinedError(
                f"compression is {self.compression!r}; expected one of {COMPRESSIONS}"
            )
        if not 1 <= self.level <= zstandard.MAX_COMPRESSION_LEVEL:
            raise JoinedError(
                f"compression level {self.level}; expected 1 to {zstandard.MAX_COMPRESSION_LEVEL}"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        return DTYPES[self.dtype_code]

    @property
    def chunks(self) -> int:
        """C, chunks a sample."""
        return self.seq_length // self.chunk_size

    @property
    def samples_per_shard(self) -> int:
        return self.samples_per_block * self.blocks_per_shard

    def num_blocks(self, num_samples: int) -> int:
        return -(-num_samples // self.samples_per_block)

    def arrays(self, num_samples: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """dtype and shape of a block's arrays, in their order."""
        b, c, k = num_samples, self.chunks, self.neighbors
        return {
            "tokens": (self.dtype, (b, self.seq_length + 1)),
            "starts": (np.dtype("u1"), (b, c + 1)),
            "keys": (np.dtype("<u8"), (b, c, 2)),
            "neighbor_ids": (np.dtype("<i8"), (b, c, k)),
            "neighbor_keys": (np.dtype("<u8"), (b, c, k, 2)),
            "neighbor_tokens": (self.dtype, (b, c, k, 2 * self.chunk_size)),
        }

    def block_bytes(self, num_samples: int) -> int:
        """Bytes of a block before compression."""
        arrays = self.arrays(num_samples).values()
        return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in arrays)


@dataclass(frozen=True)
class JoinedBlock:
    """b consecutive samples; shapes and dtypes in the module's docstring."""

    tokens: NDArray[Any]
    starts: NDArray[np.uint8]
    keys: NDArray[np.uint64]
    neighbor_ids: NDArray[np.int64]
    neighbor_keys: NDArray[np.uint64]
    neighbor_tokens: NDArray[Any]


def encode_block(block: JoinedBlock, layout: JoinedLayout) -> bytes:
    """The block's bytes as stored.

    Raises:
        JoinedError: an array of another shape, or of a dtype that its own cannot hold.
    """
    parts = []
    for name, (dtype, shape) in layout.arrays(len(block.tokens)).items():
        array: NDArray[Any] = getattr(block, name)
        if array.shape != shape or not np.can_cast(array.dtype, dtype):
            raise JoinedError(
                f"{name} is {array.dtype}{list(array.shape)}; expected {dtype}{list(shape)}"
            )
        parts.append(np.ascontiguousarray(array, dtype).tobytes())
    raw = b"".join(parts)
    if layout.compression == "none":
        return raw
    return zstandard.ZstdCompressor(level=layout.level).compress(raw)


def decode_block(
    stored: bytes, layout: JoinedLayout, num_samples: int, checksum: int, where: str
) -> JoinedBlock:
    """The block of `num_samples` samples; arrays may be read-only views of `stored`.

    Raises:
        JoinedError: another checksum than the index has, which is looked at first, or another
            length than the layout gives.
    """
    found = xxhash.xxh64_intdigest(stored)
    if found != checksum:
        raise JoinedError(
            f"{where}: checksum {found:016x}, its index says {checksum:016x}; the block is damaged"
        )
    expected = layout.block_bytes(num_samples)
    raw = stored if layout.compression == "none" else _decompress(stored, expected, where)
    if len(raw) != expected:
        raise JoinedError(
            f"{where}: {len(raw)} bytes; {num_samples} samples of this layout need {expected}"
        )
    arrays, offset = {}, 0
    for name, (dtype, shape) in layout.arrays(num_samples).items():
        count = int(np.prod(shape))
        array = np.frombuffer(raw, dtype, count, offset).reshape(shape)
        arrays[name] = np.require(array, requirements="A")
        offset += count * dtype.itemsize
    return JoinedBlock(**arrays)


def _decompress(stored: bytes, expected: int, where: str) -> bytes:
    try:
        size = zstandard.frame_content_size(stored)
        if size != expected:
            raise JoinedError(f"{where}: a zstd frame of {size} bytes; expected {expected}")
        return zstandard.ZstdDecompressor().decompress(stored)
    except zstandard.ZstdError as error:
        raise JoinedError(f"{where}: expected a zstd frame, found {error}") from None


@dataclass(frozen=True)
class ShardHeader:
    """The first 64 bytes of a shard, less magic and version."""

    dtype_code: int
    seq_length: int
    chunk_size: int
    neighbors: int
    samples_per_block: int
    first_sample: int
    num_samples: int
    compression: int

    @classmethod
    def of(cls, layout: JoinedLayout, first_sample: int, num_samples: int) -> "ShardHeader":
        return cls(
            dtype_code=layout.dtype_code,
            seq_length=layout.seq_length,
            chunk_size=layout.chunk_size,
            neighbors=layout.neighbors,
            samples_per_block=layout.samples_per_block,
            first_sample=first_sample,
            num_samples=num_samples,
            compression=COMPRESSIONS.index(layout.compression),
        )

    def to_bytes(self) -> bytes:
        return HEADER.pack(MAGIC, VERSION, *(getattr(self, f.name) for f in fields(self)))


def read_header(data: bytes, where: str) -> ShardHeader:
    """The header that a shard's first bytes are.

    Raises:
        JoinedError: too few bytes, wrong magic or version, or bytes after the fields that are not
            0.
    """
    values = _unpack(HEADER, data, MAGIC, "joined shard", where)
    if any(data[HEADER.size - 12 : HEADER.size]):
        raise JoinedError(f"{where}: the header's last 12 bytes are not 0")
    return ShardHeader(*values)


def _unpack(
    header: struct.Struct, data: bytes, magic: bytes, kind: str, where: str
) -> tuple[int, ...]:
    if len(data) < header.size:
        raise JoinedError(
            f"{where}: {len(data)} bytes; the header of a {kind} has {header.size}. The file is "
            "truncated"
        )
    found, version, *values = header.unpack_from(data)
    if found != magic:
        raise JoinedError(f"{where}: starts with {found!r}, expected {magic!r}; it is no {kind}")
    if version != VERSION:
        raise JoinedError(f"{where}: version {version}; this reader knows version {VERSION}")
    return tuple(values)


@dataclass(frozen=True)
class ShardIndex:
    """offsets u64[N + 1] of the blocks in the shard and its size; checksums u64[N] of them."""

    first_sample: int
    offsets: NDArray[np.uint64]
    checksums: NDArray[np.uint64]

    def to_bytes(self) -> bytes:
        header = INDEX_HEADER.pack(INDEX_MAGIC, VERSION, self.first_sample, len(self.checksums))
        tables = [self.offsets.astype("<u8").tobytes(), self.checksums.astype("<u8").tobytes()]
        return b"".join([header, *tables])


def read_index(data: bytes, where: str) -> ShardIndex:
    """The index that a whole `.idx` is.

    Raises:
        JoinedError: wrong magic or version, a file shorter or longer than its header promises, or
            offsets that do not ascend from the end of a shard's header.
    """
    first_sample, count = _unpack(INDEX_HEADER, data, INDEX_MAGIC, "joined shard's index", where)
    expected = INDEX_HEADER.size + 8 * (2 * count + 1)
    if len(data) != expected:
        kind = "truncated" if len(data) < expected else "over-long"
        raise JoinedError(
            f"{where}: {len(data)} bytes, but {count} blocks need {expected}; the file is {kind}"
        )
    offsets = np.frombuffer(data, "<u8", count + 1, INDEX_HEADER.size)
    checksums = np.frombuffer(data, "<u8", count, INDEX_HEADER.size + offsets.nbytes)
    if offsets[0] != HEADER.size or (offsets[1:] <= offsets[:-1]).any():
        raise JoinedError(f"{where}: block offsets do not ascend from {HEADER.size}")
    return ShardIndex(first_sample, offsets, checksums)


class JoinedShardWriter:
    """Appends blocks to an open shard and gives its index at the end."""

    def __init__(
        self, file: BinaryIO, layout: JoinedLayout, first_sample: int, num_samples: int
    ) -> None:
        self._file, self._layout = file, layout
        self._first_sample, self._num_samples, self._written = first_sample, num_samples, 0
        self._offsets, self._checksums = [HEADER.size], []
        file.write(ShardHeader.of(layout, first_sample, num_samples).to_bytes())

    def add(self, block: JoinedBlock) -> None:
        """Appends a block of samples_per_block samples, or of all that are left.

        Raises:
            JoinedError: another number of samples.
        """
        left = self._num_samples - self._written
        expected, found = min(left, self._layout.samples_per_block), len(block.tokens)
        if found != expected or not found:
            raise JoinedError(f"a block of {found} samples; expected {expected}, {left} are left")
        stored = encode_block(block, self._layout)
        self._file.write(stored)
        self._offsets.append(self._offsets[-1] + len(stored))
        self._checksums.append(xxhash.xxh64_intdigest(stored))
        self._written += found

    def write_index(self, path: Path) -> None:
        """Writes the `.idx`.

        Raises:
            JoinedError: samples that the header promises were not added.
        """
        if self._written != self._num_samples:
            raise JoinedError(
                f"{self._written} samples were added to a shard of {self._num_samples}"
            )
        offsets = np.asarray(self._offsets, np.uint64)
        checksums = np.asarray(self._checksums, np.uint64)
        path.write_bytes(ShardIndex(self._first_sample, offsets, checksums).to_bytes())
