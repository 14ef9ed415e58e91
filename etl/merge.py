"""Merges the shards of a dataset into one NeMo-readable pair `.bin`, `.idx`.

One process; tokens go from storage to storage block by block and are not kept on a local disk.
Memory is 40 bytes a document and a few blocks.
"""

import hashlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from etl.compressed import open_source
from etl.dataset import Dataset
from etl.manifest import Shard
from etl.retmmap import (
    HEADER,
    Layout,
    RetMMapError,
    RetMMapReader,
    index_blocks,
    read_sizes,
)
from etl.storage import StageFolder, StorageError, StoredFile, filesystem_of, join_url
from etl.whole_file import whole_file

log = logging.getLogger(__name__)
_BLOCK_BYTES = 8 << 20


class MergeError(ValueError):
    """A destination that holds something else."""


@dataclass(frozen=True)
class MergeConfig:
    """What to merge, and where to.

    Attributes:
        dataset_url: Folder of one dataset (a split) that jobs.prepare_data printed.
        output_prefix: The pair becomes OUTPUT_PREFIX.bin and OUTPUT_PREFIX.idx, on any fsspec URL.
        dry_run: Check the inputs, print the plan and write nothing.
    """

    dataset_url: str
    output_prefix: str
    dry_run: bool = False


def merge_dataset(config: MergeConfig) -> dict[str, Any]:
    """Writes the pair; the index, without which the tokens cannot be opened, comes last.

    Raises:
        FileNotFoundError: no dataset there.
        MergeError: the destination holds another pair.
        StorageError: a shard is damaged.
    """
    started = time.monotonic()
    dataset = Dataset(config.dataset_url)
    urls = {suffix: f"{config.output_prefix}{suffix}" for suffix in (".bin", ".idx")}
    plan = {
        "bin": urls[".bin"],
        "idx": urls[".idx"],
        "documents": dataset.num_documents,
        "chunks": dataset.num_chunks,
        "bin_bytes": sum(shard.bin.bytes for shard in dataset.manifest.shards),
        "idx_bytes": HEADER.size + 20 * dataset.num_documents + 8 * dataset.num_chunks,
    }
    if config.dry_run:
        return plan
    parts = [_part(dataset, shard) for shard in dataset.manifest.shards]
    with tqdm(desc="merge", unit="B", unit_scale=True, file=sys.stderr, mininterval=2) as bar:
        _publish(urls[".bin"], plan["bin_bytes"], lambda: _tokens(parts, bar.update))
        _publish(urls[".idx"], plan["idx_bytes"], lambda: _index(parts))
    return plan | {"seconds": time.monotonic() - started}


@dataclass(frozen=True)
class _Part:
    """One of the files to merge: its document sizes [N] in tokens, and its token file in blocks."""

    name: str
    layout: Layout
    sizes: NDArray[np.int32]
    blocks: Callable[[], Iterator[bytes]]


def merge(readers: Sequence[RetMMapReader], bin_file: BinaryIO, idx_file: BinaryIO) -> None:
    """Writes the documents of local files in order as one, byte-identical to writing all documents
    at once.

    Raises:
        RetMMapError: no files, or files that differ in chunk_size, stride, dtype or kind.
    """
    parts = [
        _Part(str(r.idx_path), r.layout, r.sizes, partial(_blocks, str(r.bin_path)))
        for r in readers
    ]
    for file, blocks in ((bin_file, _tokens(parts)), (idx_file, _index(parts))):
        for block in blocks:
            file.write(block)


def _part(dataset: Dataset, shard: Shard) -> _Part:
    url = join_url(dataset.url, shard.bin.name)
    sizes = read_sizes(StageFolder(dataset.url).fetch(shard.idx), shard.num_documents)
    return _Part(url, dataset.manifest.layout, sizes, partial(_checked_blocks, url, shard.bin))


def _checked_blocks(url: str, file: StoredFile) -> Iterator[bytes]:
    """The file's bytes.

    Raises:
        StorageError: it has another content than the manifest says.
    """
    digest = hashlib.sha256()
    for block in _blocks(url):
        digest.update(block)
        yield block
    if digest.hexdigest() != file.sha256:
        raise StorageError(
            f"{url}: sha256 {digest.hexdigest()}, the manifest says {file.sha256}; the object is "
            "damaged, prepare the dataset again"
        )


def _tokens(
    parts: Sequence[_Part], progress: Callable[[int], object] = lambda _: None
) -> Iterator[bytes]:
    _check_layouts(parts)
    for part in parts:
        for block in part.blocks():
            progress(len(block))
            yield block


def _index(parts: Sequence[_Part]) -> Iterator[bytes]:
    _check_layouts(parts)
    return index_blocks(parts[0].layout, np.concatenate([part.sizes for part in parts]))


def _check_layouts(parts: Sequence[_Part]) -> None:
    if not parts:
        raise RetMMapError("nothing to merge: expected at least one file")
    for part in parts[1:]:
        if part.layout != parts[0].layout:
            raise RetMMapError(
                f"cannot merge {part.name} ({part.layout}) with {parts[0].name} ({parts[0].layout})"
            )


def _blocks(url: str) -> Iterator[bytes]:
    with open_source(url, None) as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def _publish(url: str, num_bytes: int, blocks: Callable[[], Iterator[bytes]]) -> None:
    """Stores the blocks under `url`, unless they are there already.

    Raises:
        MergeError: something else is there.
    """
    filesystem, target = filesystem_of(url)
    filesystem.invalidate_cache()
    if not filesystem.exists(target):
        with whole_file(url, num_bytes) as file:
            for block in blocks():
                file.write(block)
        return
    found = filesystem.size(target)
    if found != num_bytes or _digest(_blocks(url)) != _digest(blocks()):
        raise MergeError(
            f"{url}: holds {found} bytes of something else, the merged file has {num_bytes}; name "
            "another output_prefix or delete it"
        )
    log.info("%s is there already", url)


def _digest(blocks: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()
