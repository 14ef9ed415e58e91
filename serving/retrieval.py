"""Live retrieval in this process: tokens of a chunk -> neighbors, by the same definition as the KNN
map job.

The chunk is decoded, embedded, searched in the index and ranked exactly; a document may be its own
neighbor's source, because a text that is being written belongs to no document.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from etl.dataset import Dataset
from etl.storage import StorageError
from indexing.built_index import open_index
from indexing.embedder import EmbedderConfig, embedder_facts, load_embedder
from indexing.embeddings import chunk_texts, dataset_tokenizer
from indexing.knn_map import NO_NEIGHBOR
from indexing.map_build import neighbor_finder

_MARGIN = 16


class LocalRetriever:
    """Answers from an index and its retrieval dataset on this machine (or fetched to it).

    Raises:
        StorageError: the index was built from another dataset or with another embedder.
    """

    def __init__(
        self,
        index_url: str,
        retrieval_url: str,
        embedder: EmbedderConfig,
        neighbors: int,
        nprobe: int | None = None,
    ) -> None:
        index, self.retrieval = open_index(index_url), Dataset(retrieval_url)
        found, expected = self.retrieval.manifest.fingerprint, index.manifest["dataset_fingerprint"]
        if found != expected:
            raise StorageError(
                f"{index_url} was built from the dataset {expected}, {retrieval_url} is {found}"
            )
        _check_embedder(index_url, index.manifest, embedder)
        self.tokenizer = dataset_tokenizer(self.retrieval)
        self.embedder = load_embedder(embedder)
        self.finder = neighbor_finder(index_url, retrieval_url, _MARGIN, nprobe)
        self.neighbors = neighbors

    def retrieve(
        self, chunks: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """(ids [C, K], tokens [C, K, 2 chunk_size], mask) of chunks [C, chunk_size]; -1 and pads
        where there are fewer."""
        vectors = self.embedder.embed(chunk_texts(chunks, self.tokenizer))
        ids, _ = self.finder.find(vectors, self.neighbors, None)
        pad = self.retrieval.manifest.pad_id
        found = self.retrieval.get_chunk(np.maximum(ids, 0).ravel()).astype(np.int64)
        tokens = np.where(ids[..., None] == NO_NEIGHBOR, pad, found.reshape(*ids.shape, -1))
        return ids, tokens, tokens != pad


def _check_embedder(index_url: str, manifest: dict[str, Any], embedder: EmbedderConfig) -> None:
    facts = embedder_facts(embedder)
    if facts["embedder_fingerprint"] != manifest["embedder_fingerprint"]:
        raise StorageError(
            f"{index_url} was built with embedder {manifest['embedder']} "
            f"({manifest['embedder_fingerprint']}), found {facts['embedder']} "
            f"({facts['embedder_fingerprint']}); use the same model, dtype and batch_size"
        )
