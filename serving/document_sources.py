"""Where the documents of a dataset come from, as people are shown it: source file, title or id.

Reads the Parquet document tables that preparation writes (`etl/shard_writer.py`), a row group at a
time, when a neighbor is shown; nothing is opened before.
"""

import threading
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from etl.dataset import Dataset
from etl.storage import StageFolder, StorageError
from serving.service import source_name

_COLUMNS = ["source", "id", "src", "title"]
_ROW_GROUPS = 64


class DocumentSources:
    """Names by document number; thread-safe."""

    def __init__(self, dataset: Dataset) -> None:
        self._url, self._shards = dataset.url, dataset.manifest.shards
        counts = [shard.num_documents for shard in self._shards]
        self._bases = np.cumsum([0, *counts], dtype=np.int64)
        self._lock = threading.Lock()
        self._file = lru_cache(_ROW_GROUPS)(self._open)
        self._group = lru_cache(_ROW_GROUPS)(self._read_group)

    def names(self, documents: NDArray[np.int64]) -> list[str]:
        """`source file or src, title or id` of each document number [N].

        Raises:
            StorageError: a table is missing or damaged.
        """
        with self._lock:
            return [self._name(number) for number in documents.tolist()]

    def _name(self, number: int) -> str:
        shard = int(np.searchsorted(self._bases, number, side="right")) - 1
        firsts = self._file(shard)[1]
        local = number - int(self._bases[shard])
        group = int(np.searchsorted(firsts, local, side="right")) - 1
        row = local - int(firsts[group])
        values = {name: column[row].as_py() for name, column in self._group(shard, group).items()}
        return source_name(values["src"] or values["source"], values["title"] or values["id"])

    def _open(self, shard: int) -> tuple[pq.ParquetFile, NDArray[np.int64]]:
        """A shard's table, and the first row of each of its row groups."""
        path = StageFolder(self._url).fetch(self._shards[shard].info)
        try:
            file = pq.ParquetFile(path)
        except pa.ArrowException as error:
            raise StorageError(
                f"{path}: no Parquet file, {error}; prepare the data again"
            ) from None
        rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        if sum(rows) != self._shards[shard].num_documents:
            raise StorageError(
                f"{path}: {sum(rows)} rows for {self._shards[shard].num_documents} documents; "
                "prepare the data again"
            )
        return file, np.cumsum([0, *rows[:-1]], dtype=np.int64)

    def _read_group(self, shard: int, group: int) -> dict[str, Any]:
        table = self._file(shard)[0].read_row_group(group, columns=_COLUMNS)
        return {name: table.column(name) for name in _COLUMNS}
