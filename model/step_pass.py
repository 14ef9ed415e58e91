"""Reading one more token of every row, each at its own position. Shape letters as in
`model/attention.py`; B rows in use, L = 1.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from model.attention import ChunkedCrossAttention, Mask, ProjectedContext
from model.decoding_cache import DecodingCache, StepStore
from model.decoding_pass import ChunkNeighbors, DecodingPass
from model.layers import FeedForwardHalf
from model.retro import Retro
from model.rotary import Table


class StepPass(DecodingPass):
    """One token of every row."""

    def __init__(
        self,
        model: Retro,
        cache: DecodingCache,
        tokens: list[int],
        neighbors: Sequence[ChunkNeighbors | None],
    ) -> None:
        super().__init__(model, cache)
        self.shape = (len(tokens), 1)
        self.rows, self.neighbors = cache.rows, neighbors
        self.positions = np.asarray([row.length for row in self.rows])
        eod = self.config.eod_id
        starts = [row.advance([t], eod) for row, t in zip(self.rows, tokens, strict=True)]
        self.starts = np.concatenate(starts)
        self.positions_B, self.longest = self.tensor(self.positions), int(self.positions.max())
        self.table = self._table(self.positions_B)
        self.mask = self._mask()
        self.rows_B = torch.arange(len(tokens), device=self.device)
        is_on = torch.tensor([row.is_retrieving for row in self.rows])
        self.is_any, self.is_all = bool(is_on.any()), bool(is_on.all())
        self.on, self.off = (part.nonzero()[:, 0].to(self.device) for part in (is_on, ~is_on))

    def _table(self, positions_B: Tensor) -> Table:
        """A position for each row, to turn [B, H, 1, P]."""
        cos, sin = self.rotary_table(positions_B)
        return cos[:, None, None], sin[:, None, None]

    def _mask(self) -> Mask:
        starts = self.starts if self.config.reset_attention_mask else np.zeros_like(self.starts)
        starts = np.maximum(starts, [row.num_pads for row in self.rows])
        if not starts.any() and (self.positions == self.longest).all():
            return Mask()
        keys = torch.arange(self.longest + 1, device=self.device)
        seen_BT = (keys >= self.tensor(starts)[:, None]) & (keys <= self.positions_B[:, None])
        return Mask.of(seen_BT[:, None], self.dtype)

    def store(self, layer: int) -> StepStore:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return StepStore(keys, values, self.rows_B, self.positions_B, self.longest + 1)

    def encode(self, y_BLD: Tensor) -> None:
        if not self.is_any:
            return
        m = self.config.chunk_size
        self.cache.chunk_states[self.rows_B, self.positions_B % m] = y_BLD[:, 0]
        complete = [row for row in self.rows if row.is_retrieving and row.length % m == 0]
        for row in complete:
            self.cache.neighbor_mask[row.index] = False
        self.found = [row for row in complete if self.neighbors[row.index] is not None]
        if self.found:
            self._encode_found()
        self._plan_context()

    def _encode_found(self) -> None:
        m, rows = self.config.chunk_size, [row.index for row in self.found]
        first_real = np.asarray([row.num_pads + m - row.length for row in self.found])
        chunk_mask = self.tensor(np.arange(m) >= first_real[:, None])
        found = [chunk for row in rows if (chunk := self.neighbors[row]) is not None]
        self.encoded = self.encode_chunks(found, self.cache.chunk_states[rows], chunk_mask)
        keys = self.encoded.mask_nT.shape[1]
        self.cache.neighbor_mask[rows, :keys] = self.encoded.mask_nT
        for row in self.found:
            row.neighbor_keys = keys

    def _plan_context(self) -> None:
        m = self.config.chunk_size
        self.num_keys = max(2 * m, *(row.neighbor_keys for row in self.rows))
        seen_B = self.visible(self.starts, self.positions)
        shown_BT = self.cache.neighbor_mask[: len(self.rows), : self.num_keys] & seen_B[:, None]
        self.context_mask = Mask.of(shown_BT[self.on, None], self.dtype)
        self.context_table = self._table((self.positions_B[self.on] + 1) % m)

    def feed_forward(self, i: int, half: FeedForwardHalf, x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        if half.cross_attention is None or not self.is_any:
            return half(x_BLD, y_BLD, None)
        context = self._context(i, half)
        if self.is_all:
            return half(x_BLD, y_BLD, context)
        out_BLD = torch.empty_like(x_BLD)
        out_BLD[self.on] = half(x_BLD[self.on], y_BLD[self.on], context)
        out_BLD[self.off] = half(x_BLD[self.off], y_BLD[self.off], None)
        return out_BLD

    def _context(self, i: int, half: FeedForwardHalf) -> ProjectedContext:
        if self.encoded is not None:
            cross = cast(ChunkedCrossAttention, half.cross_attention)
            k, v = cross.project(self.encoded.states_nTD, self.encoded.key_table)
            self.cache.keep_neighbors(i, [row.index for row in self.found], k, v)
        rows = slice(len(self.rows)) if self.is_all else self.on
        keys = self.cache.neighbor_keys[i][rows, :, : self.num_keys]
        values = self.cache.neighbor_values[i][rows, :, : self.num_keys]
        return ProjectedContext(keys, values, self.context_mask, self.context_table)
