"""Parquet files as records: rows of the row groups whose first byte lies in a range."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from etl.compressed import open_source
from etl.sources import InputError, Range, SourceFile

_BATCH_ROWS = 16
_READ_BYTES = 4 << 20


def read_rows(
    source: SourceFile, part: Range, wanted: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number in the file, its wanted columns) of the rows of the range, in order.

    Raises:
        InputError: not a Parquet file, or a damaged one.
    """
    with open_source(source.url, None) as stream:
        try:
            file = pq.ParquetFile(stream, buffer_size=_READ_BYTES)
            columns = [name for name in wanted if name in file.schema_arrow.names]
            first = 0
            for group in range(file.num_row_groups):
                metadata = file.metadata.row_group(group)
                if part.start <= _first_byte(metadata) < part.stop:
                    yield from _group_rows(file, group, first, columns)
                first += metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{source.url}: damaged, or not Parquet: {error}") from None


def _first_byte(group: Any) -> int:
    column = group.column(0)
    places = (column.dictionary_page_offset, column.data_page_offset)
    return min(place for place in places if place)


def _group_rows(
    file: pq.ParquetFile, group: int, row: int, columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
        for record in batch.to_pylist():
            yield row, record
            row += 1
