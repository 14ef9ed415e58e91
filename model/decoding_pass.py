"""What reading a prompt and reading one token of every row have in common: neighbors are encoded,
and a query sees those of the chunk that was completed last.

Base of `model/prompt_pass.py` and `model/step_pass.py`. Shape letters as in `model/attention.py`; n
chunks with neighbors.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.decoding_cache import DecodingCache
from model.retro import Retro
from model.rotary import Table


@dataclass(frozen=True, eq=False)
class ChunkNeighbors:
    """Token ids of a chunk's neighbors [K, R], and which are no pads."""

    tokens_KR: NDArray[np.int64]
    mask_KR: NDArray[np.bool_]


@dataclass(frozen=True)
class EncodedNeighbors:
    """Encoded neighbors of n chunks, all padded to the largest K: states [n, K R, width of the
    encoder], which are no pads, and positions for their keys."""

    states_nTD: Tensor
    mask_nT: Tensor
    key_table: Table


class DecodingPass:
    """What the two kinds of passes share."""

    def __init__(self, model: Retro, cache: DecodingCache) -> None:
        self.model, self.cache, self.config = model, cache, model.config
        self.device = model.word_embeddings.weight.device
        self.dtype = model.word_embeddings.weight.dtype
        self.encoded: EncodedNeighbors | None = None

    def tensor(self, values: NDArray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def rotary_table(self, positions: Tensor) -> Table:
        """In the model's dtype, which every layer would turn it into."""
        cos, sin = self.model.rotary_table(positions)
        return cos.to(self.dtype), sin.to(self.dtype)

    def visible(self, starts: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        """Whether the query at each position is in the document of the first token of the chunk
        whose neighbors it may see."""
        m = self.config.chunk_size
        same = starts <= ((positions + 1) // m - 1) * m
        return self.tensor(same | (not self.config.reset_cross_attention))

    def encode_chunks(
        self, found: list[ChunkNeighbors], chunk_nMD: Tensor, chunk_mask_nM: Tensor
    ) -> EncodedNeighbors:
        most = max(len(chunk.tokens_KR) for chunk in found)
        tokens = np.zeros((len(found), most, 2 * self.config.chunk_size), np.int64)
        mask = np.zeros(tokens.shape, bool)
        for i, chunk in enumerate(found):
            tokens[i, : len(chunk.tokens_KR)] = chunk.tokens_KR
            mask[i, : len(chunk.mask_KR)] = chunk.mask_KR
        mask_nKR = self.tensor(mask)
        embedded = self.model.word_embeddings(self.tensor(tokens))
        assert self.model.encoder is not None
        states = self.model.encoder(embedded, mask_nKR, chunk_nMD, chunk_mask_nM)
        table = self.model.neighbor_table(most, self.device)
        return EncodedNeighbors(states.flatten(1, 2), mask_nKR.flatten(1), table)
