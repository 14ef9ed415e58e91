"""Attention of the decoder and the retrieval encoder.

B batch, L sequence, C chunks, M chunk tokens, K neighbors, R neighbor tokens (2 M), N = B * C,
D width of the stack, H heads, G query groups, P head width, Q queries, T keys.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from model.block_attention import attend_blocks
from model.config import RetroConfig, StackShape
from model.rotary import Table, rotate


@dataclass(frozen=True)
class Mask:
    """Which keys each query may see. A query that may see none is let see all, and its result is
    set to zero. Made once for all layers.

    Attributes:
        added_B1QT: What is added to scores, 0 or -inf; Q may be 1 for all; None: nothing.
        has_key_B1Q1: 0 for queries that see none, else 1; None: there are no such queries.
        is_causal: Nothing is hidden but what comes later.
    """

    added_B1QT: Tensor | None = None
    has_key_B1Q1: Tensor | None = None
    is_causal: bool = False

    @staticmethod
    def of(mask_BQT: Tensor, dtype: torch.dtype) -> "Mask":
        """Of a table that is True where a query may see a key, for states of a dtype."""
        has_key_B1Q1 = mask_BQT.any(dim=-1, keepdim=True)[:, None]
        hidden = ~mask_BQT[:, None] & has_key_B1Q1
        added = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        added.masked_fill_(hidden, -torch.inf)
        # Asking is free on a CPU; a GPU would have to be waited for.
        is_full = mask_BQT.device.type == "cpu" and bool(has_key_B1Q1.all())
        return Mask(added, None if is_full else has_key_B1Q1.to(dtype))


def attend(
    q_BHQP: Tensor,
    k_BGTP: Tensor,
    v_BGTP: Tensor,
    mask: Mask | BlockMask,
    scale: float,
    drop: float,
) -> Tensor:
    """[B, H, Q, P] softmax(scale q k^T) v over the keys that the mask allows; zeros for a query
    that may see none. Probabilities are dropped with probability `drop`."""
    is_grouped = q_BHQP.shape[1] != k_BGTP.shape[1]
    if isinstance(mask, BlockMask):
        return attend_blocks(q_BHQP, k_BGTP, v_BGTP, mask, scale, is_grouped)
    out_BHQP = F.scaled_dot_product_attention(
        q_BHQP,
        k_BGTP,
        v_BGTP,
        attn_mask=mask.added_B1QT,
        dropout_p=drop,
        is_causal=mask.is_causal,
        scale=scale,
        enable_gqa=is_grouped,
    )
    return out_BHQP if mask.has_key_B1Q1 is None else out_BHQP * mask.has_key_B1Q1


class _Attention(nn.Module):
    def __init__(self, config: RetroConfig, shape: StackShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        self.queries_per_group = shape.num_attention_heads // shape.num_query_groups
        self.dense = nn.Linear(shape.query_width, shape.hidden_size, bias=config.bias)

    def _split(self, x_BLW: Tensor, queries: int, others: int) -> list[Tensor]:
        """[B, L, W] with rows ordered [group][queries, then others][P] -> the queries
        [B, G * queries, L, P] and each of the others [B, G, L, P]."""
        x = x_BLW.unflatten(-1, (self.shape.num_query_groups, queries + others, -1))
        parts = [x[..., queries + i, :].transpose(1, 2) for i in range(others)]
        return [x[..., :queries, :].flatten(2, 3).transpose(1, 2), *parts] if queries else parts

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | BlockMask) -> Tensor:
        """[B, Q, H * P]"""
        drop = self.config.attention_dropout if self.training else 0.0
        out_BHQP = attend(q, k, v, mask, self.config.attention_scale, drop)
        return out_BHQP.transpose(1, 2).flatten(2)


class KeyValueStore(Protocol):
    """Where decoding keeps the keys and values of one layer's earlier tokens."""

    def append(self, k_BGLP: Tensor, v_BGLP: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps those of new tokens; [B, G, T, P] of all tokens so far, the new ones included."""
        ...


class SelfAttention(_Attention):
    """Causal or bidirectional: the mask decides."""

    def __init__(self, config: RetroConfig, shape: StackShape) -> None:
        super().__init__(config, shape)
        width = shape.query_width + 2 * shape.group_width
        self.query_key_value = nn.Linear(shape.hidden_size, width, bias=config.bias)

    def forward(
        self,
        x_BLD: Tensor,
        table: Table,
        mask: Mask | BlockMask,
        store: KeyValueStore | None = None,
    ) -> Tensor:
        """With a store, the tokens also attend to those that it keeps, and the mask spans both."""
        q, k, v = self._split(self.query_key_value(x_BLD), self.queries_per_group, 2)
        q, k = rotate(q, table), rotate(k, table)
        if store is not None:
            k, v = store.append(k, v)
        return self.dense(self._attend(q, k, v, mask))


@dataclass(frozen=True)
class Context:
    """What a cross-attention attends to: states [N, T, D of the other stack], which of them each
    query may see, and positions."""

    states_NTD: Tensor
    mask: Mask
    query_table: Table
    key_table: Table


@dataclass(frozen=True)
class ProjectedContext:
    """A Context whose keys and values [N, G, T, P] one layer has projected already. The N queries'
    windows come ready made, [N, Q, D]."""

    keys_NGTP: Tensor
    values_NGTP: Tensor
    mask: Mask
    query_table: Table


class CrossAttention(_Attention):
    """Encoder to chunk: queries are the tokens of all K neighbors of a chunk, folded into one
    axis."""

    def __init__(self, config: RetroConfig, shape: StackShape, context_size: int) -> None:
        super().__init__(config, shape)
        self.query = nn.Linear(shape.hidden_size, shape.query_width, bias=config.bias)
        self.key_value = nn.Linear(context_size, 2 * shape.group_width, bias=config.bias)

    def forward(self, x_NQD: Tensor, context: Context | ProjectedContext) -> Tensor:
        return self.dense(self._look_up(x_NQD, context))

    def project(self, states_NTD: Tensor, key_table: Table) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values, both [N, G, T, P]."""
        k, v = self._split(self.key_value(states_NTD), 0, 2)
        return rotate(k, key_table), v

    def _look_up(self, x_NQD: Tensor, context: Context | ProjectedContext) -> Tensor:
        """[N, Q, H * P] before the output projection."""
        (q,) = self._split(self.query(x_NQD), self.queries_per_group, 0)
        if isinstance(context, ProjectedContext):
            k, v = context.keys_NGTP, context.values_NGTP
        else:
            k, v = self.project(context.states_NTD, context.key_table)
        return self._attend(rotate(q, context.query_table), k, v, context.mask)


class ChunkedCrossAttention(CrossAttention):
    """Decoder to neighbors (RETRO, section 2.4): the chunk_size queries from the last token of
    chunk u onwards attend to the encoded neighbors of chunk u. The first chunk_size - 1 positions
    attend to nothing and get the output bias only.
    """

    def __init__(self, config: RetroConfig, shape: StackShape, context_size: int) -> None:
        super().__init__(config, shape, context_size)
        self.gate = nn.Parameter(torch.zeros(1)) if config.cross_attention_gate else None

    def forward(self, x_BLD: Tensor, context: Context | ProjectedContext) -> Tensor:
        if isinstance(context, ProjectedContext):
            out_BLD = self.dense(self._look_up(x_BLD, context))
        else:
            out_BLD = self.dense(self._look_up_windows(x_BLD, context))
        return out_BLD if self.gate is None else self.gate.tanh() * out_BLD

    def _look_up_windows(self, x_BLD: Tensor, context: Context) -> Tensor:
        """[B, L, H * P], each window of queries at the states of its chunk."""
        m, length = self.config.chunk_size, x_BLD.shape[1]
        found = self._look_up(windows(x_BLD, m).flatten(0, 1), context)
        joined = found.unflatten(0, (x_BLD.shape[0], -1)).flatten(1, 2)[:, : length - m + 1]
        return F.pad(joined, (0, 0, m - 1, 0))


def windows(x: Tensor, chunk_size: int) -> Tensor:
    """[B, L, ...] -> [B, C, M, ...]: window u holds positions u M + M - 1 + (0..M-1), zeros beyond
    the sequence."""
    length = x.shape[1]
    chunks = length // chunk_size
    missing = chunks * chunk_size - (length - chunk_size + 1)
    shifted = x[:, chunk_size - 1 :]
    padding = torch.zeros_like(shifted[:, :1]).expand(-1, missing, *(-1 for _ in x.shape[2:]))
    return torch.cat([shifted, padding], dim=1).unflatten(1, (chunks, chunk_size))
