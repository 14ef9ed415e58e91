"""Embeddings of a dataset's chunks: one fp16 `.npy` block for every block_chunks chunk ids, written
once.

The embed stage of the index job writes them; training, adding, exact search and re-scoring read
them. Vectors have unit length; a row of zeros is a chunk without text (all pads), which is never
indexed and never a query.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import ArrayLike, NDArray

from etl.dataset import Dataset
from etl.storage import StageFolder, StorageError, StoredFile, join_url, read_json, scratch_folder
from etl.tokenizer import ByteLevelTokenizer, load_tokenizer
from indexing.embedder import EmbedderConfig, load_embedder

NAME = "embeddings.json"


@dataclass(frozen=True)
class EmbedTask:
    """What a worker needs to embed any block of a dataset; picklable.

    `details` go into the manifest. Chunks that the dataset `reuse_dataset_url` holds too (same
    document, same tokens) are copied from its embeddings `reuse_url` instead of being embedded
    again.
    """

    folder: StageFolder
    dataset_url: str
    embedder: EmbedderConfig
    block_chunks: int
    details: dict[str, Any]
    reuse_dataset_url: str | None = None
    reuse_url: str | None = None

    def record_name(self, block: int) -> str:
        return f"blocks/{block:06d}"


def embed_block(task: EmbedTask, block: int) -> dict[str, Any]:
    """Embeds chunk ids block * block_chunks onwards; returns the record, which an earlier attempt
    may have written."""
    record = task.folder.record(task.record_name(block))
    if record is not None:
        return record
    dataset = Dataset(task.dataset_url)
    start = block * task.block_chunks
    ids = np.arange(start, min(start + task.block_chunks, dataset.num_chunks))
    vectors, reused = _vectors(task, dataset, ids)
    with scratch_folder(task.folder.url) as scratch:
        path = scratch / "vectors.npy"
        np.save(path, vectors)
        [stored] = task.folder.store(task.record_name(block), path)
    value = {"files": {"vectors": asdict(stored)}, "rows": len(ids), "reused": reused}
    return task.folder.publish(task.record_name(block), value)


def _vectors(
    task: EmbedTask, dataset: Dataset, ids: NDArray[np.int64]
) -> tuple[NDArray[np.float16], int]:
    tokens = dataset.get_chunk(ids, continuation=False)
    todo = (tokens != dataset.manifest.pad_id).any(axis=1)
    vectors = None
    if task.reuse_url is not None and task.reuse_dataset_url is not None:
        known = _same_chunks(dataset, ids, tokens, Dataset(task.reuse_dataset_url))
        vectors = open_embeddings(task.reuse_url).rows(known)
        todo &= known < 0
    if todo.any():
        fresh = load_embedder(task.embedder).embed(
            chunk_texts(tokens[todo], _tokenizer_of(dataset))
        )
        if vectors is None:
            vectors = np.zeros((len(ids), fresh.shape[1]), np.float16)
        vectors[todo] = fresh
    if vectors is None:
        raise StorageError(
            f"{task.dataset_url}: chunks {ids[0]}..{ids[-1]} hold only pads; nothing to embed"
        )
    return vectors, int(len(ids) - todo.sum())


def _tokenizer_of(dataset: Dataset) -> ByteLevelTokenizer:
    file = dataset.manifest.tokenizer
    return load_tokenizer(str(StageFolder(dataset.url).fetch(file)), dataset.manifest.eod_token)


def chunk_texts(tokens: NDArray[Any], tokenizer: ByteLevelTokenizer) -> list[str]:
    """The text that stands for each chunk [N, chunk_size] in every search: its tokens decoded,
    specials dropped."""
    return tokenizer.decode_batch(tokens)


def _same_chunks(
    dataset: Dataset, ids: NDArray[np.int64], tokens: NDArray[Any], other: Dataset
) -> NDArray[np.int64]:
    """For each chunk the id of the same chunk of the same document in `other`, -1 where there is
    none."""
    document = dataset.chunk_to_doc(ids)
    order = np.argsort(other.document_keys, kind="stable")
    keys = dataset.document_keys[document]
    slot = np.searchsorted(other.document_keys, keys, sorter=order)
    match = order[np.minimum(slot, len(order) - 1)]
    ordinal = ids - dataset.document_first_chunk[document]
    found = other.document_first_chunk[match] + ordinal * (
        other.chunk_size // other.manifest.stride
    )
    inside = (other.document_keys[match] == keys) & (found < other.document_first_chunk[match + 1])
    found = np.where(inside, found, 0)
    same = inside & (other.get_chunk(found, continuation=False) == tokens).all(axis=1)
    return np.where(same, found, -1)


def commit_embeddings(task: EmbedTask, num_chunks: int) -> dict[str, Any]:
    """Publishes the manifest once every block has its record.

    Raises:
        StorageError: a block is missing.
    """
    blocks = []
    for block in range(num_blocks(num_chunks, task.block_chunks)):
        record = task.folder.record(task.record_name(block))
        if record is None:
            raise StorageError(
                f"{task.folder.url}: block {block} is missing; run the embed stage again"
            )
        blocks.append(record["files"]["vectors"])
    value = {
        **task.details,
        "num_chunks": num_chunks,
        "block_chunks": task.block_chunks,
        "blocks": blocks,
    }
    task.folder.remove_scratch()
    return task.folder.publish(NAME.removesuffix(".json"), value)


def num_blocks(num_chunks: int, block_chunks: int) -> int:
    return -(-num_chunks // block_chunks)


class Embeddings:
    """Memory-mapped vectors of a finished embed stage; a picklable copy opens its own maps."""

    def __init__(self, url: str, manifest: dict[str, Any]) -> None:
        self.url, self.manifest = url, manifest
        self.num_chunks: int = manifest["num_chunks"]
        self.block_chunks: int = manifest["block_chunks"]
        self._maps: dict[int, NDArray[np.float16]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    @cached_property
    def dimension(self) -> int:
        return self.block(0).shape[1]

    def block(self, i: int) -> NDArray[np.float16]:
        """[rows, dimension] read-only vectors of block i."""
        if i not in self._maps:
            path = StageFolder(self.url).fetch(StoredFile(**self.manifest["blocks"][i]))
            self._maps[i] = open_memmap(path, mode="r")
        return self._maps[i]

    def rows(self, chunk_ids: ArrayLike) -> NDArray[np.float16]:
        """[N, dimension] vectors of chunk ids (a copy); zeros for ids below 0."""
        ids = np.asarray(chunk_ids, np.int64)
        out = np.zeros((len(ids), self.dimension), np.float16)
        owner = ids // self.block_chunks
        for block in np.unique(owner[ids >= 0]):
            where = np.flatnonzero((owner == block) & (ids >= 0))
            out[where] = self.block(int(block))[ids[where] - block * self.block_chunks]
        return out

    def slices(self, start: int, stop: int) -> "list[tuple[int, NDArray[np.float16]]]":
        """(first chunk id, vectors) of the blocks, or parts of them, that cover chunk ids
        start..stop-1."""
        parts = []
        for block in range(start // self.block_chunks, num_blocks(stop, self.block_chunks)):
            base = block * self.block_chunks
            low, high = max(start - base, 0), min(stop - base, self.block_chunks)
            parts.append((base + low, self.block(block)[low:high]))
        return parts


def open_embeddings(url: str) -> Embeddings:
    """The finished embeddings in a folder.

    Raises:
        FileNotFoundError: the embed stage did not finish there.
    """
    try:
        return Embeddings(url, read_json(join_url(url, NAME)))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{url}: no {NAME}; the embed stage has not finished there"
        ) from None
