"""The forward pass of `model/retro.py` in parts: a prompt at once, then one token of every row at a
time, with what earlier parts computed kept in a `DecodingCache`.

The neighbors of a chunk are given together with its last token: they are encoded in the light of
the chunk's states, and that token is the first to see them. Between `model/retro.py` and
`model/decoding.py`; it neither samples nor retrieves. Shape letters as in `model/attention.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.decoding_cache import DecodingCache, Row
from model.decoding_pass import ChunkNeighbors
from model.prompt_pass import PromptPass
from model.retro import Retro
from model.step_pass import StepPass

_PROMPT_TOKENS = 2048


class IncrementalRetro:
    """Logits of the next token, equal to those of the full forward pass.

    Args:
        model: On any device; set to evaluation mode.
        max_rows: Sequences that can be in progress together.
        max_length: Tokens of each, pads included.
        max_neighbors: Of a chunk.
    """

    def __init__(self, model: Retro, max_rows: int, max_length: int, max_neighbors: int) -> None:
        self.model = model.eval()
        self.cache = DecodingCache(model, max_rows, max_length, max_neighbors)

    def read_prompt(
        self, row: Row, tokens: list[int], neighbors: Sequence[ChunkNeighbors | None]
    ) -> Tensor:
        """Reads the first tokens of a row, pads included, in passes of whole chunks over at most
        2,048 tokens or one chunk.

        Args:
            row: Of the cache; still empty.
            tokens: At least one.
            neighbors: Of each whole chunk; None: it has none.

        Returns:
            [V] logits after the last token.
        """
        m = self.model.config.chunk_size
        size = max(_PROMPT_TOKENS // m, 1) * m
        last_D = torch.empty(0)
        for begin in range(0, len(tokens), size):
            part = tokens[begin : begin + size]
            found = neighbors[begin // m : begin // m + len(part) // m]
            reading = PromptPass(self.model, self.cache, row, part, found)
            last_D = self._forward(part, reading)[0, -1]
        return self._logits(last_D)

    def step(self, tokens: list[int], neighbors: Sequence[ChunkNeighbors | None]) -> Tensor:
        """Reads one more token of every row.

        Args:
            tokens: Of the rows in the order of the cache.
            neighbors: Of the chunk that each token completes; None: it completes none, or one
                without neighbors.

        Returns:
            [B, V] logits after each token.
        """
        reading = StepPass(self.model, self.cache, tokens, neighbors)
        return self._logits(self._forward(tokens, reading)[:, -1])

    def _forward(self, tokens: list[int], reading: PromptPass | StepPass) -> Tensor:
        """[B, L, D] states after the last layer."""
        weight = self.model.word_embeddings.weight
        ids = torch.tensor(tokens, device=weight.device).view(reading.shape)
        x_BLD = self.model.word_embeddings(ids)
        for i, layer in enumerate(self.model.decoder_layers):
            half = layer.attention_half
            x_BLD, y_BLD = half(x_BLD, reading.table, reading.mask, reading.store(i))
            if i == self.model.config.split_layer:
                reading.encode(y_BLD)
            x_BLD = reading.feed_forward(i, layer.feed_forward_half, x_BLD, y_BLD)
        return x_BLD

    def _logits(self, states_D: Tensor) -> Tensor:
        hidden_D = self.model.final_layernorm(states_D)
        return self.model.head(hidden_D, self.model.word_embeddings.weight)
