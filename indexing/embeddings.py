"""Embeddings of a dataset's chunks: one fp16 `.npy` block for every block_chunks chunk ids, written
once.

The embed stage of the index job writes them; training, adding, exact search and re-scoring read
them. Vectors have unit length; a row of zeros is a chunk without text (all pads), which is never
indexed and never a query.
"""

import logging
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import ArrayLike, NDArray

from etl.dataset import Dataset
from etl.npy_file import write_npy
from etl.storage import StageFolder, StorageError, StoredFile, join_url, read_json, scratch_folder
from etl.tokenizer import TextTokenizer, restore_tokenizer
from indexing.embedder import Embedded, Embedder, EmbedderConfig, load_embedder
from indexing.same_chunks import chunk_finder
from indexing.token_rows import TokenRows

log = logging.getLogger(__name__)

NAME = "embeddings.json"
FINGERPRINT = "embedder_fingerprint"
Source = Literal["encoder_ids", "text"]


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
    may have written.

    Raises:
        StorageError: embeddings to copy from were made with another embedder, or are damaged.
        EmbedderError: a vector that is not finite.
    """
    record = task.folder.record(task.record_name(block))
    if record is not None:
        return record
    dataset = _dataset(task.dataset_url)
    start = block * task.block_chunks
    ids = np.arange(start, min(start + task.block_chunks, dataset.num_chunks))
    vectors, facts = _vectors(task, dataset, ids)
    with scratch_folder(task.folder.url) as scratch:
        path = scratch / "vectors.npy"
        write_npy(path, vectors)
        [stored] = task.folder.store(task.record_name(block), path)
    value = {
        "files": {"vectors": asdict(stored)},
        "rows": len(ids),
        "dimension": vectors.shape[1],
        **facts,
    }
    return task.folder.publish(task.record_name(block), value)


def _vectors(
    task: EmbedTask, dataset: Dataset, ids: NDArray[np.int64]
) -> tuple[NDArray[np.float16], dict[str, Any]]:
    """Vectors of the chunks, and how many were embedded (from which source, how many of them cut
    off) and how many copied."""
    tokens = dataset.get_chunk(ids, continuation=False)
    todo = (tokens != dataset.manifest.pad_id).any(axis=1)
    vectors, copied = _copies(task, dataset, ids, tokens)
    todo &= ~copied
    facts = {"reused": int(copied.sum()), "embedded": int(todo.sum()), "truncated": 0}
    if todo.any():
        source, fresh = _embedded(_embedder(task), dataset, ids[todo], tokens[todo])
        facts |= {"truncated": fresh.truncated, "source": source}
        vectors = np.zeros((len(ids), _dimension(task)), np.float16) if vectors is None else vectors
        vectors[todo] = fresh.vectors
    if vectors is None:
        vectors = np.zeros((len(ids), _dimension(task)), np.float16)
    return vectors, facts


def _embedder(task: EmbedTask) -> Embedder:
    """The task's embedder; that of a worker with other hardware may not be the same."""
    embedder = load_embedder(task.embedder)
    expected = task.details.get(FINGERPRINT)
    if expected is not None and embedder.fingerprint() != expected:
        raise StorageError(
            f"{task.folder.url} is to hold vectors of embedder {expected}, this worker has "
            f"{embedder.fingerprint()} ({embedder.dtype}, batches of {embedder.batch_size}); set "
            "embedder.dtype and embedder.batch_size to what all workers can do"
        )
    return embedder


def _embedded(
    embedder: Embedder, dataset: Dataset, ids: NDArray[np.int64], tokens: NDArray[Any]
) -> tuple[Source, Embedded]:
    """From the dataset's encoder ids where they are those of the embedder, else from text."""
    describe = lambda i: f"chunk {ids[i]} of {dataset.url}"
    encoder = dataset.manifest.encoder
    if encoder is not None and embedder.fits(encoder):
        rows = TokenRows.from_filled(dataset.encoder_ids(ids), encoder.pad_id)
        return "encoder_ids", embedder.embed_rows(len(ids), rows.__getitem__, describe)
    tokenizer = dataset_tokenizer(dataset)
    read = lambda part: embedder.tokenize(chunk_texts(tokens[part], tokenizer))
    return "text", embedder.embed_rows(len(ids), read, describe)


def _copies(
    task: EmbedTask, dataset: Dataset, ids: NDArray[np.int64], tokens: NDArray[Any]
) -> tuple[NDArray[np.float16] | None, NDArray[np.bool_]]:
    """Vectors [N, dimension] of the chunks that the other dataset holds too, zeros for the rest,
    and which those are [N]; None if there is nothing to copy from."""
    if task.reuse_url is None or task.reuse_dataset_url is None:
        return None, np.zeros(len(ids), np.bool_)
    source = _reusable(task.reuse_url)
    ours, theirs = task.details.get(FINGERPRINT), source.manifest.get(FINGERPRINT)
    if ours != theirs:
        raise StorageError(
            f"{source.url} was made with embedder {theirs}, {task.folder.url} is to be made with "
            f"{ours}; vectors can only be copied between the same"
        )
    known = chunk_finder(task.reuse_dataset_url).find(dataset, ids, tokens)
    vectors = source.rows(known)
    if not np.isfinite(vectors).all():
        raise StorageError(f"{source.url}: vectors are not all finite; embed that dataset again")
    return vectors, known >= 0


def _dimension(task: EmbedTask) -> int:
    return task.details.get("dimension") or load_embedder(task.embedder).dimension


@lru_cache(maxsize=2)
def _dataset(url: str) -> Dataset:
    return Dataset(url)


@lru_cache(maxsize=1)
def _reusable(url: str) -> "Embeddings":
    return open_embeddings(url)


def dataset_tokenizer(dataset: Dataset) -> TextTokenizer:
    """The tokenizer that a dataset was made with."""
    return _tokenizer(dataset.url, dataset.manifest.tokenizer, dataset.manifest.eod_token)


@lru_cache(maxsize=2)
def _tokenizer(url: str, file: StoredFile, eod_token: str) -> TextTokenizer:
    return restore_tokenizer(StageFolder(url).fetch(file).read_bytes(), eod_token)


def chunk_texts(tokens: NDArray[Any], tokenizer: TextTokenizer) -> list[str]:
    """The text that stands for each chunk [N, chunk_size] in every search: its tokens decoded,
    specials dropped."""
    return tokenizer.decode_batch(tokens)


def commit_embeddings(task: EmbedTask, num_chunks: int) -> dict[str, Any]:
    """Publishes the manifest once every block has its record; says how many texts were cut off.

    Raises:
        StorageError: a block is missing, or has another shape than this task gives it.
    """
    finished = task.folder.record(NAME.removesuffix(".json"))
    if finished is not None:
        return finished
    names = [task.record_name(block) for block in range(num_blocks(num_chunks, task.block_chunks))]
    records = task.folder.all_records(names, "run the embed stage again")
    for block, record in enumerate(records):
        _check_shape(task, block, record, num_chunks)
    totals = {key: sum(r[key] for r in records) for key in ("embedded", "reused", "truncated")}
    value = {
        **task.details,
        "num_chunks": num_chunks,
        "block_chunks": task.block_chunks,
        "blocks": [record["files"]["vectors"] for record in records],
        "sources": sorted({record["source"] for record in records if "source" in record}),
        **totals,
    }
    _warn_of_truncation(task, totals)
    task.folder.remove_scratch()
    return task.folder.publish(NAME.removesuffix(".json"), value)


def _check_shape(task: EmbedTask, block: int, record: dict[str, Any], num_chunks: int) -> None:
    found = (record["rows"], record["dimension"])
    rows = min(task.block_chunks, num_chunks - block * task.block_chunks)
    expected = (rows, task.details.get("dimension", record["dimension"]))
    if found != expected:
        raise StorageError(
            f"{task.folder.url}: block {block} has shape {found}, expected {expected}; it was made "
            "by another task. Delete the folder and run the embed stage again"
        )


def _warn_of_truncation(task: EmbedTask, totals: dict[str, int]) -> None:
    if totals["truncated"]:
        log.warning(
            "%s: %d of %d embedded chunks (%.2f%%) reach the embedder's maximum length, so the end "
            "of their text may be missing from their vectors; prepare with a smaller chunk_size, "
            "or take an embedder that reads longer texts",
            task.folder.url,
            totals["truncated"],
            totals["embedded"],
            100 * totals["truncated"] / totals["embedded"],
        )


def num_blocks(num_chunks: int, block_chunks: int) -> int:
    return -(-num_chunks // block_chunks)


def covering_blocks(start: int, stop: int, block_chunks: int) -> range:
    """Numbers of the blocks that hold chunk ids start..stop-1."""
    return range(start // block_chunks, num_blocks(stop, block_chunks))


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
        return self.manifest.get("dimension") or self.block(0).shape[1]

    def block(self, i: int) -> NDArray[np.float16]:
        """[rows, dimension] read-only vectors of block i.

        Raises:
            StorageError: the file is missing, cut off, or no array of the expected shape and type.
        """
        if i not in self._maps:
            self._maps[i] = self._open(StoredFile(**self.manifest["blocks"][i]), i)
        return self._maps[i]

    def _open(self, file: StoredFile, i: int) -> NDArray[np.float16]:
        path = StageFolder(self.url).fetch(file)
        remedy = "delete the folder and run the embed stage again"
        try:
            vectors = open_memmap(path, mode="r")
        except ValueError as error:
            raise StorageError(f"{self.url}/{file.name}: no array, {error}; {remedy}") from None
        rows = min(self.block_chunks, self.num_chunks - i * self.block_chunks)
        expected = (np.dtype(np.float16), (rows, self.manifest.get("dimension", vectors.shape[-1])))
        if (vectors.dtype, vectors.shape) != expected:
            raise StorageError(
                f"{self.url}/{file.name}: {vectors.dtype} {vectors.shape}, expected "
                f"{expected[0]} {expected[1]}; {remedy}"
            )
        return vectors

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
        for block in covering_blocks(start, stop, self.block_chunks):
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
