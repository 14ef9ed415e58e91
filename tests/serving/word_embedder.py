"""A deterministic embedder without a model, for tests whose claims are not about embeddings."""

import hashlib
import threading

import numpy as np


class WordEmbedder:
    """The mean of fixed random vectors of a text's words. `open` holds texts with the word `slow`
    back while it is not set."""

    def __init__(self, dimension=16, name="words"):
        self.dimension, self._name = dimension, name
        self.open, self.waiting = threading.Event(), threading.Event()
        self.open.set()

    def fingerprint(self):
        return f"{self._name}-{self.dimension}"

    def embed(self, texts):
        if any("slow" in text for text in texts):
            self.waiting.set()
            assert self.open.wait(30)
        return np.asarray([self._vector(text) for text in texts]).reshape(len(texts), -1)

    def _vector(self, text):
        total = np.zeros(self.dimension)
        for word in text.split():
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
            total += np.random.default_rng(seed).standard_normal(self.dimension)
        return (total / max(np.linalg.norm(total), 1e-12)).astype(np.float16)
