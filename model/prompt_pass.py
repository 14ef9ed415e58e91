"""Reading a prompt: many tokens of one row at once. Shape letters as in `model/attention.py`; N
windows of chunked cross-attention, B = 1.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import ChunkedCrossAttention, Mask, ProjectedContext
from model.decoding_cache import DecodingCache, PromptStore, Row
from model.decoding_pass import ChunkNeighbors, DecodingPass
from model.layers import FeedForwardHalf
from model.retro import Retro


class PromptPass(DecodingPass):
    """Whole chunks of one row's prompt, and at its end the rest. Queries of chunked cross-attention
    are cut into windows, the first of which looks at the chunk before this pass."""

    def __init__(
        self,
        model: Retro,
        cache: DecodingCache,
        row: Row,
        tokens: list[int],
        neighbors: Sequence[ChunkNeighbors | None],
    ) -> None:
        super().__init__(model, cache)
        self.row, self.neighbors = row, neighbors
        self.begin, self.length = row.length, len(tokens)
        self.shape = (1, self.length)
        self.starts = row.advance(tokens, self.config.eod_id)
        self.positions = np.arange(self.begin, row.length)
        self.table = self.rotary_table(self.tensor(self.positions))
        self.mask = self._mask()
        self.places: list[int] = []

    def _mask(self) -> Mask:
        starts = self.starts if self.config.reset_attention_mask else np.zeros_like(self.starts)
        starts = np.maximum(starts, self.row.num_pads)
        if self.begin == 0 and not starts.any():
            return Mask(is_causal=True)
        keys = torch.arange(self.row.length, device=self.device)
        query = self.tensor(self.positions)[:, None]
        seen_LT = (keys >= self.tensor(starts)[:, None]) & (keys <= query)
        return Mask.of(seen_LT[None], self.dtype)

    def store(self, layer: int) -> PromptStore:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return PromptStore(keys, values, self.row.index, self.begin)

    def encode(self, y_BLD: Tensor) -> None:
        if not self.row.is_retrieving:
            return
        m, chunks = self.config.chunk_size, self.length // self.config.chunk_size
        rest = self.length - chunks * m
        self.cache.chunk_states[self.row.index, :rest] = y_BLD[0, chunks * m :]
        self.places = [u for u, chunk in enumerate(self.neighbors) if chunk is not None]
        if self.places:
            chunk_CMD = y_BLD[0, : chunks * m].unflatten(0, (chunks, m))
            real = self.tensor(self.positions[: chunks * m] >= self.row.num_pads)
            found = [chunk for chunk in self.neighbors if chunk is not None]
            self.encoded = self.encode_chunks(
                found, chunk_CMD[self.places], real.unflatten(0, (chunks, m))[self.places]
            )
        self._plan_windows(chunks)

    def _plan_windows(self, chunks: int) -> None:
        """Which keys each window sees, for all layers; then the newest chunk's become the row's."""
        m, index = self.config.chunk_size, self.row.index
        new = 0 if self.encoded is None else self.encoded.mask_nT.shape[1]
        self.num_keys = max(self.row.neighbor_keys, new, 2 * m)
        shown_NT = torch.zeros(chunks + 1, self.num_keys, dtype=torch.bool, device=self.device)
        shown_NT[0] = self.cache.neighbor_mask[index, : self.num_keys]
        if self.encoded is not None:
            shown_NT[[u + 1 for u in self.places], :new] = self.encoded.mask_nT
        seen_NM = self.fold(self.visible(self.starts, self.positions)[None, :, None])[..., 0]
        self.window_mask = Mask.of(seen_NM[:, :, None] & shown_NT[:, None], self.dtype)
        self.window_table = self.rotary_table(torch.arange(m, device=self.device))
        if chunks:
            self.cache.neighbor_mask[index, : self.num_keys] = shown_NT[-1]
            self.row.neighbor_keys = self.num_keys

    def fold(self, x_BLD: Tensor) -> Tensor:
        """[1, L, ...] -> [N, M, ...] windows, each from the last token of a chunk on."""
        m = self.config.chunk_size
        windows = self.length // m + 1
        padded = F.pad(x_BLD, (0, 0, 1, windows * m - self.length - 1))
        return padded[0].unflatten(0, (windows, m))

    def feed_forward(self, i: int, half: FeedForwardHalf, x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        if half.cross_attention is None or not self.row.is_retrieving:
            return half(x_BLD, y_BLD, None)
        out_NMD = half(self.fold(x_BLD), self.fold(y_BLD), self._context(i, half))
        return out_NMD.flatten(0, 1)[None, 1 : self.length + 1]

    def _context(self, i: int, half: FeedForwardHalf) -> ProjectedContext:
        cached = self.cache.neighbor_keys[i], self.cache.neighbor_values[i]
        index, windows = self.row.index, self.length // self.config.chunk_size + 1
        keys, values = (t.new_zeros(windows, t.shape[1], self.num_keys, t.shape[3]) for t in cached)
        for part, own in zip((keys, values), cached):
            part[0] = own[index, :, : self.num_keys]
        if self.encoded is not None:
            cross = cast(ChunkedCrossAttention, half.cross_attention)
            k, v = cross.project(self.encoded.states_nTD, self.encoded.key_table)
            windows_of = [u + 1 for u in self.places]
            keys[windows_of, :, : k.shape[2]], values[windows_of, :, : v.shape[2]] = k, v
        if windows > 1:
            self.cache.keep_neighbors(i, [index], keys[-1:], values[-1:])
        return ProjectedContext(keys, values, self.window_mask, self.window_table)
