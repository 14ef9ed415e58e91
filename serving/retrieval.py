"""The static service: neighbors from a finished index and its retrieval dataset, by the same
definition as the KNN map job.

The chunk is decoded, embedded, searched in the index and ranked exactly; any document may be found,
because a text that is being written belongs to none.
"""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etl.dataset import Dataset
from etl.storage import StorageError
from indexing.built_index import open_index
from indexing.embedder import EmbedderConfig, embedder_facts
from indexing.map_build import neighbor_finder
from indexing.neighbors import Block
from serving.chunk_rules import ChunkRules
from serving.document_sources import DocumentSources
from serving.embedding import TextEmbedder, open_embedder
from serving.service import ChunkService

_MARGIN = 16


class LocalRetriever(ChunkService):
    """Answers from an index and its retrieval dataset on this machine (or fetched to it).

    Args:
        embedder: The embedder of the index, or which one to load.
        nprobe: Inverted lists a query visits; by default what the index was tuned to.

    Raises:
        FileNotFoundError: there is no finished index, or no finished dataset.
        StorageError: the index was built from another dataset or with another embedder, or the
            dataset is no retrieval dataset.
        IndexBuildError: nprobe was given, but the index has no inverted lists.
    """

    name = "static"

    def __init__(
        self,
        index_url: str,
        retrieval_url: str,
        embedder: EmbedderConfig | TextEmbedder,
        nprobe: int | None = None,
    ) -> None:
        index, self.dataset = open_index(index_url), Dataset(retrieval_url)
        found, expected = self.dataset.manifest.fingerprint, index.manifest["dataset_fingerprint"]
        if found != expected:
            raise StorageError(
                f"{index_url} was built from the dataset {expected}, {retrieval_url} is {found}; "
                "name the dataset that the index was built from"
            )
        _check_embedder(index_url, index.manifest, embedder)
        is_config = isinstance(embedder, EmbedderConfig)
        self.embedder = open_embedder(embedder) if is_config else embedder
        self.rules = ChunkRules.of_dataset(self.dataset)
        self._finder = neighbor_finder(index_url, retrieval_url, _MARGIN, nprobe)
        self._documents = DocumentSources(self.dataset)
        self._lock = threading.Lock()

    def is_empty(self) -> bool:
        return self._finder.candidates.total == 0

    def pinned(self) -> "LocalRetriever":
        """Itself: it never changes."""
        return self

    def find(self, vectors: NDArray[np.float16], neighbors: int) -> Block:
        """(chunk ids, exact scores), both [C, K]; one search at a time, as Faiss uses all cores."""
        with self._lock:
            return self._finder.find(vectors, neighbors, None)

    def chunks_with_continuations(self, chunk_ids: NDArray[np.int64]) -> NDArray[Any]:
        with self._lock:
            return self.dataset.get_chunk(chunk_ids)

    def sources(self, chunk_ids: NDArray[np.int64]) -> list[str]:
        """Source file or src, title or id of each chunk's document."""
        with self._lock:
            documents = self.dataset.chunk_to_doc(chunk_ids)
        return self._documents.names(documents)


def _check_embedder(
    index_url: str, manifest: dict[str, Any], embedder: EmbedderConfig | TextEmbedder
) -> None:
    if isinstance(embedder, EmbedderConfig):
        facts = embedder_facts(embedder)
        found, name = facts["embedder_fingerprint"], f"{facts['embedder']} "
    else:
        found, name = embedder.fingerprint(), ""
    if found != manifest["embedder_fingerprint"]:
        raise StorageError(
            f"{index_url} was built with embedder {manifest['embedder']} "
            f"({manifest['embedder_fingerprint']}), found {name}({found}); use the same model, "
            "dtype and batch_size"
        )
