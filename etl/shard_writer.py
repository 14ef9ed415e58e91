"""Writes one shard of a dataset: tokens and addresses, the document table, bytes of chunks, encoder
ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from etl.encoder_ids import EncoderTokenizer
from etl.manifest import DOCUMENT_DTYPE, Shard
from etl.npy_file import NpyFile
from etl.records import Document
from etl.retmmap import Layout, RetMMapWriter
from etl.storage import StageFolder
from etl.tokenizer import Encoded, TextTokenizer

_INFO = pa.schema(
    [
        ("document", pa.int64()),
        ("source", pa.string()),
        ("offset", pa.int64()),
        ("id", pa.string()),
        ("src", pa.string()),
        ("title", pa.string()),
        ("text_bytes", pa.int64()),
        ("num_tokens", pa.int64()),
    ]
)
_ENCODED_CHUNKS = 4096
_ROW_GROUP = 1 << 14


@dataclass(frozen=True)
class Piece:
    """A document with its tokens, end-of-document included, and its cluster."""

    document: Document
    encoded: Encoded
    cluster: int


class ShardWriter:
    """Documents in, files in a local folder, then `store`."""

    def __init__(
        self,
        scratch: Path,
        layout: Layout,
        tokenizer: TextTokenizer,
        encoder: EncoderTokenizer | None,
        nemo_padding: bool,
        source_names: Sequence[str],
    ) -> None:
        scratch.mkdir()
        suffixes = (".bin", ".idx", ".docs.npy", ".info.parquet", ".chunk_bytes.npy")
        self._paths = [scratch / f"shard{suffix}" for suffix in suffixes]
        self._encoder_path = scratch / "shard.encoder.npy"
        self._file: IO[bytes] = open(self._paths[0], "wb")  # noqa: SIM115
        self._writer = RetMMapWriter(self._file, layout, tokenizer.pad_id, nemo_padding)  # type: ignore[arg-type]
        self._layout, self._tokenizer, self._encoder = layout, tokenizer, encoder
        self._nemo_padding, self._source_names = nemo_padding, source_names
        self._info = pq.ParquetWriter(self._paths[3], _INFO)
        self._info_rows: list[pa.RecordBatch] = []
        self._documents = NpyFile(self._paths[2], DOCUMENT_DTYPE)
        self._chunk_bytes = NpyFile(self._paths[4], np.dtype("<u4"))
        self._encoder_ids = open(scratch / "encoder_ids", "w+b")  # noqa: SIM115
        self._encoder_blocks: list[tuple[int, int]] = []
        self._count = self._num_tokens = self._text_bytes = 0

    def add(self, pieces: Sequence[Piece]) -> None:
        """Appends documents."""
        tokens = [piece.encoded.ids for piece in pieces]
        self._writer.add_documents(tokens)
        table = np.zeros(len(pieces), DOCUMENT_DTYPE)
        documents = [piece.document for piece in pieces]
        hashes = b"".join(document.content_hash for document in documents)
        table["content_hash"] = np.frombuffer(hashes, "<u8").reshape(-1, 2)
        table["cluster"] = [piece.cluster for piece in pieces]
        for name in ("source", "offset", "text_bytes"):
            table[name] = [getattr(document, name) for document in documents]
        table["num_tokens"] = [len(ids) for ids in tokens]
        self._documents.append(table)
        self._num_tokens += int(table["num_tokens"].sum())
        self._text_bytes += int(table["text_bytes"].sum())
        self._add_info(documents, table)
        self._add_chunk_bytes(pieces)
        if self._encoder is not None:
            self._add_encoder_ids(tokens, self._encoder)

    def _add_info(self, documents: Sequence[Document], table: NDArray[np.void]) -> None:
        columns: dict[str, Any] = {
            "document": np.arange(self._count, self._count + len(table)),
            "source": [self._source_names[document.source] for document in documents],
            "id": [document.id for document in documents],
            "src": [document.src for document in documents],
            "title": [document.title for document in documents],
            **{name: table[name] for name in ("offset", "text_bytes", "num_tokens")},
        }
        arrays = [pa.array(columns[field.name], field.type) for field in _INFO]
        self._info_rows.append(pa.RecordBatch.from_arrays(arrays, schema=_INFO))
        self._count += len(table)
        if sum(rows.num_rows for rows in self._info_rows) >= _ROW_GROUP:
            self._write_info()

    def _write_info(self) -> None:
        """A row group of what has gathered: one for each megabyte of text would cost more time."""
        if self._info_rows:
            self._info.write_table(pa.Table.from_batches(self._info_rows, _INFO))
            self._info_rows = []

    def _add_chunk_bytes(self, pieces: Sequence[Piece]) -> None:
        lengths = np.asarray([len(piece.encoded.ids) for piece in pieces])
        counts = self._layout.chunk_counts(self._layout.padded_sizes(lengths, self._nemo_padding))
        base = np.repeat(np.cumsum(lengths) - lengths, counts)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = number * self._layout.stride
        limit = np.repeat(lengths, counts)
        sizes = np.concatenate([piece.encoded.byte_lengths for piece in pieces])
        begins = base + np.minimum(starts, limit)
        stops = base + np.minimum(starts + self._layout.chunk_size, limit)
        self._chunk_bytes.append(_sums(sizes, begins, stops))

    def _add_encoder_ids(
        self, tokens: Sequence[NDArray[np.integer[Any]]], encoder: EncoderTokenizer
    ) -> None:
        lengths = np.asarray([len(ids) for ids in tokens])
        sizes = self._layout.padded_sizes(lengths, self._nemo_padding)
        begins = np.cumsum(sizes) - sizes
        padded = np.full(sizes.sum(), self._tokenizer.pad_id, np.int32)
        for begin, ids in zip(begins, tokens, strict=True):
            padded[begin : begin + len(ids)] = ids
        counts = self._layout.chunk_counts(sizes)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(begins, counts) + number * self._layout.stride
        for first in range(0, len(starts), _ENCODED_CHUNKS):
            places = starts[first : first + _ENCODED_CHUNKS, None]
            block = padded[places + np.arange(self._layout.chunk_size)]
            rows = encoder.rows(encoder.encode(self._tokenizer.decode_batch(block)))
            self._encoder_blocks.append(rows.shape)
            self._encoder_ids.write(rows.tobytes())

    def _store_encoder_ids(self, encoder: EncoderTokenizer) -> None:
        """The blocks as one array, as wide as its longest row."""
        width = max(width for _, width in self._encoder_blocks)
        out = NpyFile(self._encoder_path, encoder.dtype, (width,))
        self._encoder_ids.seek(0)
        for count, narrow in self._encoder_blocks:
            data = self._encoder_ids.read(count * narrow * encoder.dtype.itemsize)
            rows = np.full((count, width), encoder.facts.pad_id, encoder.dtype)
            rows[:, :narrow] = np.frombuffer(data, encoder.dtype).reshape(count, narrow)
            out.append(rows)
        out.close()

    def store(self, folder: StageFolder, stem: str) -> Shard:
        """Closes the files and stores them in the folder."""
        self._write_info()
        for file in (self._file, self._info, self._documents, self._chunk_bytes):
            file.close()
        with open(self._paths[1], "wb") as file:
            num_chunks = self._writer.write_index(file)
        paths = list(self._paths)
        if self._encoder is not None:
            self._store_encoder_ids(self._encoder)
            paths.append(self._encoder_path)
        self._encoder_ids.close()
        stored = folder.store(stem, *paths)
        return Shard(
            *(*stored, None)[:6],  # type: ignore[arg-type]
            num_documents=self._count,
            num_chunks=num_chunks,
            num_tokens=self._num_tokens,
            text_bytes=self._text_bytes,
        )


def _sums(
    values: NDArray[np.integer[Any]], begins: NDArray[np.int64], stops: NDArray[np.int64]
) -> NDArray[np.int64]:
    """[N] sums of values[begin:stop]."""
    if np.array_equal(begins[1:], stops[:-1]):  # end to end: no table of all partial sums
        filled = begins < stops
        sums = np.zeros(len(begins), np.int64)
        sums[filled] = np.add.reduceat(values, begins[filled], dtype=np.int64)
        return sums
    table = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=table[1:])
    return table[stops] - table[begins]
