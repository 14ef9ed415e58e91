"""The embedder that all retrieval services of a process share: one model, used by one thread at a
time, and texts that two services are asked about are embedded once.
"""

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from indexing.embedder import EmbedderConfig, load_embedder

_CACHED_LISTS = 64
_CACHED_TEXTS = 64


class TextEmbedder(Protocol):
    """What services need of an embedder (`indexing/embedder.py`)."""

    @property
    def dimension(self) -> int: ...

    def fingerprint(self) -> str:
        """32 hex digits over all that determines the vectors."""
        ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float16]:
        """[N, dimension] unit vectors, zeros for texts without a token."""
        ...


class SharedEmbedder:
    """Serializes the use of an embedder and remembers the last short lists of texts whole, because
    the vectors are a function of the list. What comes back is read-only."""

    def __init__(self, embedder: TextEmbedder) -> None:
        self._embedder = embedder
        self._lock = threading.Lock()
        self._remembered = lru_cache(_CACHED_LISTS)(self._embed)

    @property
    def dimension(self) -> int:
        return self._embedder.dimension

    def fingerprint(self) -> str:
        return self._embedder.fingerprint()

    def embed(self, texts: Sequence[str]) -> NDArray[np.float16]:
        """[N, dimension] unit vectors, zeros for texts without a token."""
        with self._lock:
            if len(texts) > _CACHED_TEXTS:
                return self._embed(tuple(texts))
            return self._remembered(tuple(texts))

    def _embed(self, texts: tuple[str, ...]) -> NDArray[np.float16]:
        vectors = self._embedder.embed(texts)
        vectors.flags.writeable = False
        return vectors


def open_embedder(config: EmbedderConfig) -> SharedEmbedder:
    """The process's embedder, loaded once.

    Raises:
        EmbedderError: it cannot be loaded.
    """
    return _shared(config)


@lru_cache(maxsize=1)
def _shared(config: EmbedderConfig) -> SharedEmbedder:
    return SharedEmbedder(load_embedder(config))
