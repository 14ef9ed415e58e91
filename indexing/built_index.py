"""A finished index folder: its manifest, and search in it. Written by `indexing/index_build.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etl.storage import StageFolder, StoredFile, content_key, join_url, read_json
from indexing import faiss_index
from indexing.embeddings import Embeddings, open_embeddings
from indexing.neighbors import Searcher, best_of
from indexing.searchers import Found, open_searcher

NAME = "index.json"


@dataclass(frozen=True)
class BuiltIndex:
    """One merged index, or shards of it that did not fit one process together."""

    url: str
    manifest: dict[str, Any]

    @property
    def embeddings(self) -> Embeddings:
        """Embeddings of the indexed chunks, in a sibling folder."""
        return open_embeddings(self.embeddings_url)

    @property
    def embeddings_url(self) -> str:
        return join_url(self.url.rstrip("/").rpartition("/")[0], self.manifest["embeddings"])

    @property
    def fingerprint(self) -> str:
        """32 hex digits over the content of all its files."""
        return content_key([file["sha256"] for _, file in sorted(self.manifest["files"].items())])

    @property
    def files(self) -> list[StoredFile]:
        """One file, or one of each shard, in order."""
        return [StoredFile(**file) for _, file in sorted(self.manifest["files"].items())]

    def num_lists(self) -> int:
        """Inverted lists of the index; 0 if it has none."""
        path = StageFolder(self.url).fetch(self.files[0])
        return faiss_index.num_lists(faiss_index.read_index(path))

    def _verified(self, i: int) -> Path:
        """Local path of file i; its bytes are checked the first time."""
        if i not in self._paths:
            self._paths[i] = StageFolder(self.url).fetch_verified(self.files[i])
        return self._paths[i]

    @cached_property
    def _paths(self) -> dict[int, Path]:
        return {}

    def searcher(
        self, nprobe: int | None = None, device: str = "cpu", shard: int | None = None
    ) -> Searcher:
        """Search in the whole index, or in one of its files.

        Raises:
            IndexBuildError: nprobe was given, but the index has no inverted lists; or the device
                cannot be used.
            StorageError: a file is missing or damaged.
        """
        if nprobe is not None and self.manifest["nprobe"] is None and not self.num_lists():
            raise faiss_index.IndexBuildError(
                f"nprobe is {nprobe}, but index {self.url} has no inverted lists to visit"
            )
        nprobe = nprobe or self.manifest["nprobe"]
        if device != "cpu" and self.manifest["factory"] == "Flat":
            from indexing.exact_torch import TorchSearcher

            return TorchSearcher(self.embeddings, self.manifest["indexed_chunks"], device)
        shards = range(len(self.files)) if shard is None else [shard]
        searchers = [open_searcher(self._verified(i), nprobe, device) for i in shards]
        return searchers[0] if len(searchers) == 1 else ShardSearcher(searchers)


class ShardSearcher:
    """Searches the shards of an index one after the other."""

    def __init__(self, shards: Sequence[Searcher]) -> None:
        self._shards = shards
        self.total = sum(shard.total for shard in shards)
        self.score_error = shards[0].score_error

    def search(self, queries: NDArray[np.float32], k: int, skip: range | None = None) -> Found:
        parts = [shard.search(queries, k, skip) for shard in self._shards]
        ids, scores = best_of([(ids, scores) for scores, ids in parts])
        return scores, ids


def open_index(url: str) -> BuiltIndex:
    """The finished index in a folder.

    Raises:
        FileNotFoundError: the last stage did not finish there.
    """
    try:
        return BuiltIndex(url, read_json(join_url(url, NAME)))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{url}: no {NAME}; expected the folder that jobs.build_index prints"
        ) from None
