"""What decoding remembers of the sequences in progress: one row of each tensor per sequence.

Rows in use are always the first ones, so that a step over all of them works on views: removing a
row moves the last one into its place. A free row is zero. Shape letters as in `model/attention.py`;
S rows, T keys.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.retro import Retro


@dataclass(eq=False)
class Row:
    """Progress of one sequence.

    Attributes:
        index: Its place in the tensors; changes when another row is removed.
        num_pads: Pads at its left; they are positions, but no token sees them.
        is_retrieving: Whether it goes through chunked cross-attention.
        length: Tokens read so far, pads included.
        document_start: Position at which the document of the next token starts.
        neighbor_keys: Behind as many keys of neighbors, none is visible.
    """

    index: int
    num_pads: int
    is_retrieving: bool
    length: int = 0
    document_start: int = 0
    neighbor_keys: int = 0

    def advance(self, tokens: list[int], eod_id: int) -> NDArray[np.int64]:
        """Counts new tokens as read; [L] where the document of each of them starts."""
        starts = np.empty(len(tokens), np.int64)
        for i, token in enumerate(tokens):
            starts[i] = self.document_start
            self.length += 1
            if token == eod_id and self.length > self.num_pads:
                self.document_start = self.length
        return starts


class DecodingCache:
    """Keys and values of all tokens in each layer, the split layer's states of the chunk that is
    being written, and keys and values of the newest chunk's neighbors in each layer with chunked
    cross-attention. Memory is taken once, in the model's dtype and on its device."""

    def __init__(self, model: Retro, num_rows: int, max_length: int, max_neighbors: int) -> None:
        config, weight = model.config, model.word_embeddings.weight
        m, groups = config.chunk_size, config.decoder_shape.num_query_groups
        zeros = weight.new_zeros
        token_shape = (num_rows, groups, max_length, config.head_dim)
        neighbor_shape = (num_rows, groups, max_neighbors * 2 * m, config.head_dim)
        self.keys = [zeros(token_shape) for _ in model.layers]
        self.values = [zeros(token_shape) for _ in model.layers]
        crossing = config.dec_cross_attention
        self.neighbor_keys = {layer: zeros(neighbor_shape) for layer in crossing}
        self.neighbor_values = {layer: zeros(neighbor_shape) for layer in crossing}
        self.neighbor_mask = zeros((num_rows, max_neighbors * 2 * m), dtype=torch.bool)
        self.chunk_states = zeros((num_rows, m, config.hidden_size))
        self.rows: list[Row] = []

    def tensors(self) -> list[Tensor]:
        """All of them, rows first."""
        neighbors = [*self.neighbor_keys.values(), *self.neighbor_values.values()]
        return [*self.keys, *self.values, *neighbors, self.neighbor_mask, self.chunk_states]

    def add_row(self, num_pads: int, is_retrieving: bool) -> Row:
        """An empty row behind those in use; there must be a free one."""
        row = Row(len(self.rows), num_pads, is_retrieving)
        self.rows.append(row)
        return row

    def remove_row(self, row: Row) -> None:
        last = self.rows.pop()
        for tensor in self.tensors():
            tensor[row.index] = tensor[last.index]
            tensor[last.index] = 0
        if last is not row:
            self.rows[row.index] = last
            last.index = row.index

    def keep_neighbors(
        self, layer: int, rows: list[int], keys_NGTP: Tensor, values_NGTP: Tensor
    ) -> None:
        length = keys_NGTP.shape[2]
        self.neighbor_keys[layer][rows, :, :length] = keys_NGTP
        self.neighbor_values[layer][rows, :, :length] = values_NGTP


@dataclass(frozen=True)
class PromptStore:
    """The tokens of one row from a position on, as `model.attention.KeyValueStore`; B = 1."""

    keys_SGTP: Tensor
    values_SGTP: Tensor
    row: int
    begin: int

    def append(self, k_BGLP: Tensor, v_BGLP: Tensor) -> tuple[Tensor, Tensor]:
        end = self.begin + k_BGLP.shape[2]
        self.keys_SGTP[self.row, :, self.begin : end] = k_BGLP[0]
        self.values_SGTP[self.row, :, self.begin : end] = v_BGLP[0]
        own = slice(self.row, self.row + 1)
        return self.keys_SGTP[own, :, :end], self.values_SGTP[own, :, :end]


@dataclass(frozen=True)
class StepStore:
    """One token of each of the first B rows, at its own position; L = 1."""

    keys_SGTP: Tensor
    values_SGTP: Tensor
    rows_B: Tensor
    positions_B: Tensor
    length: int

    def append(self, k_BGLP: Tensor, v_BGLP: Tensor) -> tuple[Tensor, Tensor]:
        batch = len(self.rows_B)
        self.keys_SGTP[self.rows_B, :, self.positions_B] = k_BGLP[:, :, 0]
        self.values_SGTP[self.rows_B, :, self.positions_B] = v_BGLP[:, :, 0]
        return self.keys_SGTP[:batch, :, : self.length], self.values_SGTP[:batch, :, : self.length]
