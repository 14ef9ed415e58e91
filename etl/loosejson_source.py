"""`spark.read.format("loosejson")`: the records that preparation would read, as a Spark table.

    spark.dataSource.register(LooseJsonSource)
    spark.read.format("loosejson").option("text_key", "text").load("s3://bucket/folder")

Spark file.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
from pyspark.sql.datasource import DataSource, DataSourceReader, InputPartition

from etl.records import Document, Fields, RecordReader, Reject
from etl.sources import Range, find_sources, plan_splits

_ROWS = 1024
_SCHEMA = (
    "text string, id string, src string, title string, file string, offset long, reason string"
)
_ARROW = pa.schema(
    [(name, pa.string()) for name in ("text", "id", "src", "title", "file")]
    + [("offset", pa.int64()), ("reason", pa.string())]
)


class LooseJsonSource(DataSource):
    """Options: path or urls (comma-separated), text_key, id_key, src_key, title_key, apply_ftfy,
    split_bytes. A record that cannot be used has a `reason` and no text."""

    @classmethod
    def name(cls) -> str:
        return "loosejson"

    def schema(self) -> str:
        return _SCHEMA

    def reader(self, schema: Any) -> "LooseJsonReader":
        return LooseJsonReader(dict(self.options))


class _Split(InputPartition):
    def __init__(self, ranges: tuple[Range, ...]) -> None:
        super().__init__(None)
        self.ranges = ranges


class LooseJsonReader(DataSourceReader):
    """A partition is a split of the input, as in preparation.

    Raises:
        FileNotFoundError, InputError: the inputs cannot be used as named.
    """

    def __init__(self, options: dict[str, str]) -> None:
        given = {
            key: options[key]
            for key in ("text_key", "id_key", "src_key", "title_key")
            if key in options
        }
        fields = Fields(**given, apply_ftfy=options.get("apply_ftfy", "false").lower() == "true")
        urls = (options.get("urls") or options.get("path") or "").split(",")
        self._records = RecordReader(tuple(find_sources([url for url in urls if url])), fields)
        self._split_bytes = int(options.get("split_bytes", 64 << 20))

    def partitions(self) -> list[_Split]:  # type: ignore[override]
        splits = plan_splits(self._records.sources, self._split_bytes)
        return [_Split(tuple(ranges)) for ranges in splits]

    def read(self, partition: _Split) -> Iterator[pa.RecordBatch]:  # type: ignore[override]
        records = self._records.read(partition.ranges)
        while rows := [self._row(record) for record in islice(records, _ROWS)]:
            yield pa.RecordBatch.from_pylist(rows, _ARROW)

    def _row(self, record: Document | Reject) -> dict[str, Any]:
        place = {"file": self._records.sources[record.source].url, "offset": record.offset}
        if isinstance(record, Reject):
            return place | {"reason": record.reason}
        names = ("text", "id", "src", "title")
        return place | {name: getattr(record, name) for name in names}
