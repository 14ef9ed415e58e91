"""The manifest of a joined dataset, and its blocks by range requests. numpy and storage only.

Written last by the join job (the commit point). It names everything that the samples were made
from, so a trainer can refuse what does not fit its model.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from etl.storage import RangeReader, StageFolder, StoredFile, content_key, join_url, read_json
from indexing.joined import (
    HEADER,
    VERSION,
    JoinedBlock,
    JoinedError,
    JoinedLayout,
    ShardHeader,
    decode_block,
    read_header,
    read_index,
)

FORMAT = "retromill-joined"
NAME = "joined.json"


@dataclass(frozen=True)
class JoinedShard:
    """One shard: its file, its index and its part of the samples."""

    data: StoredFile
    index: StoredFile
    first_sample: int
    num_samples: int

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "JoinedShard":
        files = {name: StoredFile(**entry[name]) for name in ("data", "index")}
        return cls(first_sample=entry["first_sample"], num_samples=entry["num_samples"], **files)


@dataclass(frozen=True)
class JoinedManifest:
    """What a joined dataset was made from, and its shards in the order of samples.

    index_fingerprint is None where the map's manifest names no index.
    """

    layout: JoinedLayout
    split: str
    training_fingerprint: str
    retrieval_fingerprint: str
    map_fingerprint: str
    index_fingerprint: str | None
    tokenizer_fingerprint: str
    pad_id: int
    eod_id: int
    vocab_size: int
    num_samples: int
    shards: tuple[JoinedShard, ...]

    @property
    def fingerprint(self) -> str:
        """32 hex digits over the content: the parents and the hashes of all shards."""
        return content_key(FORMAT, VERSION, asdict(self))

    @property
    def chunk_size(self) -> int:
        return self.layout.chunk_size

    @property
    def num_blocks(self) -> int:
        return self.layout.num_blocks(self.num_samples)

    @property
    def stored_bytes(self) -> int:
        return sum(shard.data.bytes + shard.index.bytes for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        about = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint}
        return about | asdict(self)


def load_manifest(joined_url: str) -> JoinedManifest:
    """The manifest in the folder of a joined dataset.

    Raises:
        FileNotFoundError: there is none: the join did not finish.
        JoinedError: another format or version, missing fields, an edited manifest, or shards that
            are not all samples in order.
    """
    url = join_url(joined_url, NAME)
    try:
        found = read_json(url)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{url}: no such file; expected the folder that jobs.join_neighbors prints"
        ) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise JoinedError(f"{url}: expected a manifest with format {FORMAT!r}")
    if found.get("version") != VERSION:
        raise JoinedError(
            f"{url}: version {found.get('version')!r}; this code reads version {VERSION}"
        )
    names = [f.name for f in fields(JoinedManifest)]
    missing = [name for name in names if name not in found]
    if missing:
        raise JoinedError(f"{url}: fields {missing} are missing; join again")
    layout = JoinedLayout(**found["layout"])
    shards = tuple(map(JoinedShard.from_json, found["shards"]))
    plain = {name: found[name] for name in names} | {"layout": layout, "shards": shards}
    manifest = JoinedManifest(**plain)
    if manifest.fingerprint != found.get("fingerprint"):
        raise JoinedError(
            f"{url}: fingerprint {found.get('fingerprint')} does not match the content; it was "
            "edited"
        )
    _check_ranges(manifest, url)
    return manifest


def _check_ranges(manifest: JoinedManifest, url: str) -> None:
    step, total = manifest.layout.samples_per_shard, manifest.num_samples
    expected = [(first, min(step, total - first)) for first in range(0, total, step)]
    found = [(shard.first_sample, shard.num_samples) for shard in manifest.shards]
    if found != expected:
        raise JoinedError(
            f"{url}: shards of {found[:3]}... samples; {total} samples in shards of {step} are "
            f"{expected[:3]}..."
        )


class JoinedShardReader:
    """One shard's blocks by range requests. Opening reads the header and the index.

    Raises:
        FileNotFoundError: no such file.
        JoinedError: wrong magic, version or layout; a file of another size than the index and the
            manifest say; an index of another shard.
    """

    def __init__(self, url: str, layout: JoinedLayout, shard: JoinedShard) -> None:
        self.url, self.layout, self.num_samples = url, layout, shard.num_samples
        folder = StageFolder(url)
        self._where = folder.path_of(shard.data.name)
        self._file = RangeReader(self._where)
        self._check_header(ShardHeader.of(layout, shard.first_sample, shard.num_samples))
        where = folder.path_of(shard.index.name)
        self.index = read_index(RangeReader(where).readall(), where)
        self._check_index(where, shard)

    def _check_header(self, expected: ShardHeader) -> None:
        header = read_header(self._range(0, HEADER.size), self._where)
        if header != expected:
            raise JoinedError(f"{self._where}: found {header}, the manifest says {expected}")

    def _check_index(self, where: str, shard: JoinedShard) -> None:
        index, blocks = self.index, self.layout.num_blocks(shard.num_samples)
        if (index.first_sample, len(index.checksums)) != (shard.first_sample, blocks):
            raise JoinedError(
                f"{where}: {len(index.checksums)} blocks from sample {index.first_sample}; "
                f"expected {blocks} from {shard.first_sample}"
            )
        found, promised = self._file.seek(0, 2), int(index.offsets[-1])
        if found != promised or found != shard.data.bytes:
            kind = "truncated" if found < promised else "over-long"
            raise JoinedError(
                f"{self._where}: {found} bytes, its index says {promised}, the manifest "
                f"{shard.data.bytes}; the file is {kind}"
            )

    def _range(self, start: int, stop: int) -> bytes:
        return self._file.read_range(start, stop)

    def stored_bytes(self, i: int) -> int:
        """Bytes of block i as stored."""
        return int(self.index.offsets[i + 1]) - int(self.index.offsets[i])

    def stored(self, i: int) -> bytes:
        """Block i as stored; from any thread.

        Raises:
            IndexError: no such block.
        """
        if not 0 <= i < len(self.index.checksums):
            raise IndexError(f"{self._where}: block {i} of {len(self.index.checksums)}")
        return self._range(int(self.index.offsets[i]), int(self.index.offsets[i + 1]))

    def decode(self, i: int, stored: bytes) -> JoinedBlock:
        """Block i of its stored bytes.

        Raises:
            JoinedError: its checksum or its length is wrong.
        """
        size = self.layout.samples_per_block
        return decode_block(
            stored,
            self.layout,
            min(size, self.num_samples - i * size),
            int(self.index.checksums[i]),
            f"{self._where} block {i}",
        )


class JoinedDataset:
    """A finished joined dataset; shards are opened on first use."""

    def __init__(self, url: str) -> None:
        self.url, self.manifest = url, load_manifest(url)
        self._open: dict[int, JoinedShardReader] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def shard(self, i: int) -> JoinedShardReader:
        if i not in self._open:
            shard = self.manifest.shards[i]
            self._open[i] = JoinedShardReader(self.url, self.manifest.layout, shard)
        return self._open[i]

    def stored_bytes(self, number: int) -> int:
        """Bytes of a block as stored."""
        shard, i = self._place(number)
        return shard.stored_bytes(i)

    def stored(self, number: int) -> bytes:
        """A block as stored."""
        shard, i = self._place(number)
        return shard.stored(i)

    def decode(self, number: int, stored: bytes) -> JoinedBlock:
        """A block of its stored bytes.

        Raises:
            JoinedError: its checksum or its length is wrong.
        """
        shard, i = self._place(number)
        return shard.decode(i, stored)

    def block(self, number: int) -> JoinedBlock:
        """Block `number` of the dataset: samples from number * samples_per_block on.

        Raises:
            IndexError: no such block.
            JoinedError: its checksum or its length is wrong.
        """
        return self.decode(number, self.stored(number))

    def _place(self, number: int) -> tuple[JoinedShardReader, int]:
        if not 0 <= number < self.manifest.num_blocks:
            raise IndexError(f"{self.url}: block {number} of {self.manifest.num_blocks}")
        shard, i = divmod(number, self.manifest.layout.blocks_per_shard)
        return self.shard(shard), i


def open_joined(url: str) -> JoinedDataset:
    """The joined dataset in a folder; errors as `load_manifest`."""
    return JoinedDataset(url)
