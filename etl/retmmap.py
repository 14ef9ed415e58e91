"""retmmap: padded token documents in one `.bin`, their chunk addresses in one `.idx`.

Written by the preparation job, read by every later stage. Byte-compatible with NeMo's RETRO files.
numpy only.

    .bin   documents back to back, each padded with pad ids to a multiple of chunk_size;
           in a retrieval file chunk_size more pads follow each document, as a continuation
    .idx   offset  type      field
           0       9 bytes   b"MMIDRET\\0\\0"
           9       u32       version = 1
           13      u32       stride; 0 (old files) is read as 64
           17      u8        dtype code
           18      u64       number of documents N
           26      u64       chunk_size
           34      u64       number of chunks M
           42      u8        1 for a retrieval file
           43      i32[N]    size of each document in tokens, with its pads, without the extra
                             retrieval chunk
                   i64[N]    byte address of each document
                   i64[N]    id of each document's first chunk
                   i64[M]    byte address of each chunk

Chunks of a document start at token offsets 0, stride, 2 stride, ... while a whole chunk fits.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAGIC = b"MMIDRET\x00\x00"
VERSION = 1
LEGACY_STRIDE = 64
HEADER = struct.Struct("<9sIIBQQQB")
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f8"),
    8: np.dtype("<u2"),
}
_MAX_DOCUMENT_TOKENS = 2**31 - 1
_BLOCK_CHUNKS = 1 << 20


class RetMMapError(ValueError):
    """A token file that is not what its header promises, or tokens that do not fit the file."""


def dtype_code(dtype: Any) -> int:
    """The code the format stores for a numpy dtype (float64: 7; 6 is read as the same).

    Raises:
        RetMMapError: the format has no code for it.
    """
    wanted = np.dtype(dtype).newbyteorder("<")
    codes = [code for code, known in DTYPES.items() if known == wanted]
    if not codes:
        raise RetMMapError(
            f"dtype {np.dtype(dtype)} has no code; use one of "
            f"{sorted({str(d) for d in DTYPES.values()})}"
        )
    return codes[-1] if wanted.kind == "f" else codes[0]


def dtype_for_vocabulary(vocab_size: int) -> np.dtype[Any]:
    """NeMo's rule: uint16 below 65500 token ids, int32 from there."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True)
class Layout:
    """What determines the bytes of a file besides its documents."""

    chunk_size: int
    stride: int
    dtype_code: int
    retrieval_db: bool

    @classmethod
    def of(
        cls, chunk_size: int, dtype: Any, retrieval_db: bool = False, stride: int | None = None
    ) -> "Layout":
        """stride defaults to chunk_size.

        Raises:
            RetMMapError: chunk_size < 1, stride does not divide chunk_size, or dtype without a
                code.
        """
        layout = cls(
            chunk_size, chunk_size if stride is None else stride, dtype_code(dtype), retrieval_db
        )
        layout.check()
        return layout

    def check(self) -> None:
        if not 1 <= self.chunk_size < 2**31:
            raise RetMMapError(f"chunk_size is {self.chunk_size}; expected 1 or more")
        if self.stride < 1 or self.chunk_size % self.stride:
            raise RetMMapError(f"stride {self.stride} does not divide chunk_size {self.chunk_size}")
        if self.dtype_code not in DTYPES:
            raise RetMMapError(f"dtype code {self.dtype_code}; expected one of {sorted(DTYPES)}")

    @property
    def dtype(self) -> np.dtype[Any]:
        return DTYPES[self.dtype_code]

    @property
    def gap(self) -> int:
        """Extra pads after each document, in tokens."""
        return self.chunk_size if self.retrieval_db else 0

    def chunk_counts(self, sizes: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """[N] number of chunks of documents of `sizes` tokens."""
        return (sizes.astype(np.int64) - self.chunk_size) // self.stride + 1

    def padded_sizes(
        self, lengths: NDArray[np.integer[Any]], nemo_padding: bool
    ) -> NDArray[np.int64]:
        """[N] sizes after padding: the next multiple of chunk_size, or NeMo's, which always adds a
        pad.
        """
        c = self.chunk_size
        lengths = lengths.astype(np.int64)
        return (lengths // c + 1) * c if nemo_padding else -(-lengths // c) * c


def document_addresses(layout: Layout, sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """[N + 1] byte addresses of the documents; the last entry is the length of `.bin`."""
    occupied = (sizes.astype(np.int64) + layout.gap) * layout.dtype.itemsize
    return np.concatenate([[0], np.cumsum(occupied)]).astype(np.int64)


def first_chunk_ids(layout: Layout, sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """[N + 1] id of each document's first chunk; the last entry is the number of chunks."""
    return np.concatenate([[0], np.cumsum(layout.chunk_counts(sizes))]).astype(np.int64)


def chunk_address_blocks(layout: Layout, sizes: NDArray[np.int32]) -> Iterator[NDArray[np.int64]]:
    """Byte addresses of all chunks in order, about a million at a time."""
    addresses, first = document_addresses(layout, sizes), first_chunk_ids(layout, sizes)
    step = layout.stride * layout.dtype.itemsize
    start = 0
    while start < len(sizes):
        stop = max(
            start + 1, int(np.searchsorted(first, first[start] + _BLOCK_CHUNKS, side="right")) - 1
        )
        counts = np.diff(first[start : stop + 1])
        base = np.repeat(addresses[start:stop] - first[start:stop] * step, counts)
        yield base + np.arange(first[start], first[stop], dtype=np.int64) * step
        start = stop


def write_index(file: BinaryIO, layout: Layout, sizes: NDArray[np.int32]) -> int:
    """Writes the whole `.idx` for documents of `sizes` tokens; returns the number of chunks."""
    for block in index_blocks(layout, sizes):
        file.write(block)
    return int(layout.chunk_counts(sizes).sum())


def index_blocks(layout: Layout, sizes: NDArray[np.int32]) -> Iterator[bytes]:
    """The bytes of the `.idx` for documents of `sizes` tokens, in parts."""
    first = first_chunk_ids(layout, sizes)
    count, chunks = len(sizes), int(first[-1])
    fields = (layout.stride, layout.dtype_code, count, layout.chunk_size, chunks)
    yield HEADER.pack(MAGIC, VERSION, *fields, layout.retrieval_db)
    yield sizes.astype("<i4").tobytes()
    yield document_addresses(layout, sizes)[:-1].astype("<i8").tobytes()
    yield first[:-1].astype("<i8").tobytes()
    for block in chunk_address_blocks(layout, sizes):
        yield block.astype("<i8").tobytes()


def read_sizes(idx_path: str | Path, num_documents: int) -> NDArray[np.int32]:
    """[num_documents] the document sizes in an `.idx` that is known to be whole."""
    return np.fromfile(idx_path, "<i4", num_documents, offset=HEADER.size)


class RetMMapWriter:
    """Appends documents to an open `.bin` and writes the `.idx` at the end.

    Documents come with their end-of-document token and without pads. nemo_padding adds at least one
    pad to every document, a whole chunk to one that already is a multiple of chunk_size (NeMo's
    bytes).
    """

    def __init__(
        self, bin_file: BinaryIO, layout: Layout, pad_id: int, nemo_padding: bool = False
    ) -> None:
        self._file = bin_file
        self.layout = layout
        self.pad_id = pad_id
        self.nemo_padding = nemo_padding
        self._sizes: list[NDArray[np.int32]] = []
        self._check_range(np.asarray([pad_id]))

    def add(self, tokens: ArrayLike) -> None:
        """Appends one document, integers [n], n >= 1."""
        self.add_documents([np.asarray(tokens)])

    def add_documents(self, documents: Sequence[NDArray[Any]]) -> None:
        """Appends documents, integers [n] each, n >= 1.

        Raises:
            RetMMapError: an empty document, one over 2^31 - 1 tokens, or an id that the dtype
                cannot hold; then none of them is appended.
        """
        if not documents:
            return
        lengths = np.asarray([len(document) for document in documents])
        if lengths.min() < 1:
            raise RetMMapError(f"document {lengths.argmin()} has no tokens; expected at least one")
        sizes = self.layout.padded_sizes(lengths, self.nemo_padding)
        if sizes.max() > _MAX_DOCUMENT_TOKENS:
            limit = _MAX_DOCUMENT_TOKENS
            raise RetMMapError(f"a document of {sizes.max()} tokens; the format holds {limit}")
        for document in documents:
            self._check_range(document)
        starts = np.cumsum(sizes + self.layout.gap) - (sizes + self.layout.gap)
        padded = np.full(int((sizes + self.layout.gap).sum()), self.pad_id, self.layout.dtype)
        for start, document in zip(starts.tolist(), documents, strict=True):
            padded[start : start + len(document)] = document
        self._file.write(padded.data if padded.size else b"")
        self._sizes.append(sizes.astype(np.int32))

    def _check_range(self, tokens: NDArray[Any]) -> None:
        dtype = self.layout.dtype
        if dtype.kind == "f" or len(tokens) == 0 or np.can_cast(tokens.dtype, dtype):
            return
        limits, low, high = np.iinfo(dtype), int(tokens.min()), int(tokens.max())
        if low < limits.min or high > limits.max:
            raise RetMMapError(f"token ids {low}..{high} do not fit {dtype}; use a wider dtype")

    @property
    def sizes(self) -> NDArray[np.int32]:
        return np.concatenate([np.empty(0, np.int32), *self._sizes])

    def write_index(self, idx_file: BinaryIO) -> int:
        """Writes the `.idx`; returns the number of chunks."""
        return write_index(idx_file, self.layout, self.sizes)


class RetMMapReader:
    """A memory-mapped token file. Opening checks the header, both lengths and the document tables.

    The document tables (20 bytes a document) are held in memory, tokens and chunk addresses are
    mapped. Arrays that come back are copies in the file's dtype, except `get_document`, a read-only
    view of the map.

    Raises:
        FileNotFoundError: no such file.
        RetMMapError: wrong magic, version or dtype code; a file shorter or longer than the header
            promises; a size that is not a multiple of chunk_size; tables that disagree with the
            sizes.
    """

    def __init__(self, bin_path: str | Path, idx_path: str | Path) -> None:
        self.bin_path, self.idx_path = Path(bin_path), Path(idx_path)
        raw = _map(self.idx_path, np.dtype("u1"))
        layout, self.num_documents, self.num_chunks = self._read_header(raw)
        sizes, addresses, first_chunk, self.chunk_addresses = self._tables(raw)
        self.sizes = np.array(sizes)
        self.stride = layout.stride
        self.layout = self._effective_layout(layout)
        self._check_tables(addresses, first_chunk)
        self.tokens = self._map_tokens()

    def _read_header(self, raw: NDArray[np.uint8]) -> tuple[Layout, int, int]:
        path = self.idx_path
        if len(raw) < HEADER.size:
            raise _fail(
                path, f"{len(raw)} bytes; a retmmap header has {HEADER.size}. The file is truncated"
            )
        magic, version, stride, code, documents, chunk_size, chunks, retrieval = HEADER.unpack(
            raw[: HEADER.size].tobytes()
        )
        if magic != MAGIC:
            raise _fail(
                path, f"starts with {magic!r}, expected {MAGIC!r}; this is not a retmmap index"
            )
        if version != VERSION:
            raise _fail(path, f"version {version}; this reader knows version {VERSION}")
        if code not in DTYPES:
            raise _fail(path, f"dtype code {code}; expected one of {sorted(DTYPES)}")
        if retrieval not in (0, 1):
            raise _fail(path, f"retrieval flag {retrieval}; expected 0 or 1")
        self.is_legacy = stride == 0
        layout = Layout(chunk_size, stride or LEGACY_STRIDE, code, bool(retrieval))
        try:
            replace(layout, stride=layout.chunk_size if self.is_legacy else layout.stride).check()
        except RetMMapError as error:
            raise _fail(path, str(error)) from None
        expected = HEADER.size + documents * 20 + chunks * 8
        if len(raw) != expected:
            kind = "truncated" if len(raw) < expected else "over-long"
            raise _fail(
                path,
                f"{len(raw)} bytes, but {documents} documents and {chunks} chunks need {expected}; "
                f"the file is {kind}",
            )
        return layout, documents, chunks

    def _tables(self, raw: NDArray[np.uint8]) -> tuple[Any, ...]:
        n, m, start = self.num_documents, self.num_chunks, HEADER.size
        tables = []
        for dtype, count in (("<i4", n), ("<i8", n), ("<i8", n), ("<i8", m)):
            stop = start + count * np.dtype(dtype).itemsize
            tables.append(raw[start:stop].view(dtype))
            start = stop
        return tuple(tables)

    def _effective_layout(self, layout: Layout) -> Layout:
        """Files from before the stride field were cut with stride = chunk_size, though they are
        read as 64.
        """
        if self.is_legacy and len(self.sizes):
            natural = replace(layout, stride=layout.chunk_size)
            if natural.chunk_counts(self.sizes).sum() == self.num_chunks:
                return natural
        return layout

    def _check_tables(
        self, stored_addresses: NDArray[np.int64], stored_first: NDArray[np.int64]
    ) -> None:
        c, sizes, path = self.layout.chunk_size, self.sizes, self.idx_path
        wrong = np.flatnonzero((sizes < c) | (sizes % c != 0))
        if len(wrong):
            d = int(wrong[0])
            raise _fail(
                path,
                f"document {d} has {sizes[d]} tokens; expected a positive multiple of chunk_size "
                f"{c}",
            )
        first = first_chunk_ids(self.layout, sizes)
        addresses = document_addresses(self.layout, sizes)
        if first[-1] != self.num_chunks:
            raise _fail(
                path, f"header says {self.num_chunks} chunks, the document sizes give {first[-1]}"
            )
        for name, found, expected in (
            ("first chunk id", stored_first, first[:-1]),
            ("byte address", stored_addresses, addresses[:-1]),
        ):
            differing = np.flatnonzero(found != expected)
            if len(differing):
                d = int(differing[0])
                raise _fail(
                    path, f"{name} of document {d} is {found[d]}, the sizes give {expected[d]}"
                )
        self.first_chunk, self.addresses, self._bin_bytes = (
            first[:-1],
            addresses[:-1],
            int(addresses[-1]),
        )

    def _map_tokens(self) -> NDArray[Any]:
        found = self.bin_path.stat().st_size
        if found != self._bin_bytes:
            kind = "truncated" if found < self._bin_bytes else "over-long"
            raise _fail(
                self.bin_path,
                f"{found} bytes, the index needs {self._bin_bytes}; the file is {kind}",
            )
        return _map(self.bin_path, self.layout.dtype)

    def check_chunk_addresses(self) -> None:
        """Reads the whole chunk table and compares it with the sizes (opening does not: it can be
        gigabytes).
        """
        start = 0
        for block in chunk_address_blocks(self.layout, self.sizes):
            found = self.chunk_addresses[start : start + len(block)]
            differing = np.flatnonzero(found != block)
            if len(differing):
                i = int(differing[0])
                message = (
                    f"byte address of chunk {start + i} is {found[i]}, the sizes give {block[i]}"
                )
                raise _fail(self.idx_path, message)
            start += len(block)

    @property
    def chunk_size(self) -> int:
        return self.layout.chunk_size

    @property
    def retrieval_db(self) -> bool:
        return self.layout.retrieval_db

    def get_chunk(
        self, chunk_ids: int | slice | ArrayLike, continuation: bool = True
    ) -> NDArray[Any]:
        """Tokens of chunks: [..., chunk_size], or [..., 2 chunk_size] from a retrieval file with
        `continuation`.

        Raises:
            IndexError: an id outside 0..num_chunks - 1.
        """
        ids = (
            np.arange(self.num_chunks)[chunk_ids]
            if isinstance(chunk_ids, slice)
            else np.asarray(chunk_ids, np.int64)
        )
        self._check_ids(ids)
        width = self.chunk_size * (2 if continuation and self.retrieval_db else 1)
        starts = self.chunk_addresses[ids] // self.layout.dtype.itemsize
        return self.tokens[starts[..., None] + np.arange(width)]

    def _check_ids(self, ids: NDArray[np.int64]) -> None:
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_chunks):
            raise IndexError(
                f"{self.idx_path}: chunk ids {ids.min()}..{ids.max()}; the file holds "
                f"0..{self.num_chunks - 1}"
            )

    def chunk_to_doc(self, chunk_ids: ArrayLike) -> NDArray[np.int64]:
        """Document of each chunk id, same shape."""
        ids = np.asarray(chunk_ids, np.int64)
        self._check_ids(ids)
        return np.searchsorted(self.first_chunk, ids, side="right") - 1

    def get_chunk_id(self, document: int, offset: int) -> int:
        """Id of the chunk that starts `offset` tokens (a multiple of chunk_size) into the document.

        Raises:
            IndexError: no such document, or offset outside the document.
            RetMMapError: offset is not a multiple of chunk_size.
        """
        size = self._document_size(document, offset)
        if offset % self.chunk_size:
            raise RetMMapError(
                f"offset {offset} is not a multiple of chunk_size {self.chunk_size} (size {size})"
            )
        return int(self.first_chunk[document]) + offset // self.stride

    def get_document(self, document: int, offset: int = 0) -> NDArray[Any]:
        """The document's tokens from `offset` to its size, pads included."""
        size = self._document_size(document, offset)
        start = int(self.addresses[document]) // self.layout.dtype.itemsize
        return self.tokens[start + offset : start + size]

    def _document_size(self, document: int, offset: int) -> int:
        if not 0 <= document < self.num_documents:
            raise IndexError(
                f"{self.idx_path}: document {document}; the file holds 0..{self.num_documents - 1}"
            )
        size = int(self.sizes[document])
        if not 0 <= offset < size:
            raise IndexError(
                f"{self.idx_path}: offset {offset} in document {document} of {size} tokens"
            )
        return size


def _fail(path: Path, message: str) -> RetMMapError:
    return RetMMapError(f"{path}: {message}")


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")
