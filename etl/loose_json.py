"""Loose JSON: one object a line, read from a byte range of a file."""

from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from etl.compressed import open_source
from etl.records import MAX_RECORD_BYTES
from etl.sources import Range, SourceFile

_BLOCK_BYTES = 1 << 20


def read_lines(
    source: SourceFile, part: Range, max_bytes: int = MAX_RECORD_BYTES
) -> Iterator[tuple[int, Any]]:
    """(byte offset of the line, its JSON value) of every line that starts in the range; a
    ValueError in place of the value says why there is none. Blank lines are no records."""
    with open_source(source.url, source.compression) as file:
        for offset, line in _lines(file, source, part, max_bytes):
            if isinstance(line, ValueError) or not line.isspace():
                yield offset, _parse(line, offset)


def _lines(
    file: BinaryIO, source: SourceFile, part: Range, max_bytes: int
) -> Iterator[tuple[int, bytes | ValueError]]:
    position = _first_line(file, part)
    stop = None if source.compression else part.stop
    while stop is None or position < stop:
        line = file.readline(max_bytes)
        if not line:
            return
        start, position = position, position + len(line)
        if len(line) == max_bytes and not line.endswith(b"\n"):
            position += _rest_of_line(file)
            yield start, ValueError(f"a line of more than {max_bytes} bytes")
        else:
            yield start, line


def _first_line(file: BinaryIO, part: Range) -> int:
    """Where the first line of the range starts, or its end if none does: a huge line is not read to
    its end by each of the splits that it spans."""
    if part.start == 0:
        return 0
    position = part.start - 1
    file.seek(position)
    while position < part.stop - 1:
        data = file.readline(min(_BLOCK_BYTES, part.stop - 1 - position))
        if not data:
            break
        position += len(data)
        if data.endswith(b"\n"):
            return position
    return part.stop


def _rest_of_line(file: BinaryIO) -> int:
    """Reads on until after the next line end; how many bytes that were."""
    count = 0
    while data := file.readline(_BLOCK_BYTES):
        count += len(data)
        if data.endswith(b"\n"):
            break
    return count


def _parse(line: bytes | ValueError, offset: int) -> Any:
    if isinstance(line, ValueError):
        return line
    if offset == 0:
        line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return ValueError(f"not JSON: {error.msg}")
