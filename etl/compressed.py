"""Reads `.gz` and `.zst` objects from any fsspec URL as plain bytes, many frames or one.

A file that ends inside a frame is an error: no document goes missing because an upload was cut.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import zstandard

from etl.storage import RangeReader, filesystem_of, is_local

_READ_BYTES = 4 << 20
_PACKED_BYTES = 8 << 10  # of which zstd can make at most 256 MiB
_MAX_WINDOW = 1 << 31  # what `zstd --long=31` writes


class CompressedError(ValueError):
    """A compressed file that is damaged or cut short."""


class _ZstdFile(io.RawIOBase):
    """Decompresses frame after frame.

    fsspec's own reader cannot read lines, and takes a file that was cut for a whole one.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: Any = None
        self._packed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            packed = self._packed or self._file.read(_PACKED_BYTES)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            if self._frame is None:
                decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
                self._frame = decompressor.decompressobj()
            self._plain = memoryview(self._frame.decompress(packed))
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count


def _plain(url: str) -> BinaryIO:
    if is_local(url):
        return cast(BinaryIO, open(filesystem_of(url)[1], "rb", _READ_BYTES))
    return cast(BinaryIO, io.BufferedReader(RangeReader(url), _READ_BYTES))


@contextmanager
def open_source(url: str, compression: str | None) -> Iterator[BinaryIO]:
    """The uncompressed bytes behind `url`; compression is None, "gzip" or "zstd".

    Raises:
        CompressedError: while reading, if the compressed data is damaged or incomplete.
    """
    with _plain(url) as file:
        try:
            if compression == "zstd":
                yield cast(BinaryIO, io.BufferedReader(_ZstdFile(file), _READ_BYTES))
            elif compression == "gzip":
                yield cast(BinaryIO, gzip.GzipFile(fileobj=file))
            else:
                yield file
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise CompressedError(
                f"{url}: damaged or incomplete {compression} data: {error}"
            ) from error
