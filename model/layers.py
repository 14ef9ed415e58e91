"""Transformer layers, each made of two halves so that the retrieval encoder can run between them.

    x += self_attention(input_layernorm(x));  y = post_attention_layernorm(x)        AttentionHalf
    [x += cross_attention(y);                 y = post_inter_attention_layernorm(x)] FeedForwardHalf
    x += mlp(y)

Shape letters as in `model/attention.py`.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from model.attention import (
    ChunkedCrossAttention,
    Context,
    CrossAttention,
    KeyValueStore,
    Mask,
    ProjectedContext,
    SelfAttention,
)
from model.config import RetroConfig, StackShape
from model.rotary import Table


def norm(config: RetroConfig, size: int) -> nn.Module:
    if config.normalization == "rmsnorm":
        return nn.RMSNorm(size, eps=config.layernorm_epsilon)
    return nn.LayerNorm(size, eps=config.layernorm_epsilon, bias=config.bias)


class MLP(nn.Module):
    """gelu: W2 gelu(W1 x). swiglu: W2 (silu(A x) * B x), the rows of A and then of B in W1."""

    def __init__(self, config: RetroConfig, shape: StackShape) -> None:
        super().__init__()
        self.is_gated = config.activation == "swiglu"
        inner, outer = shape.ffn_hidden_size, shape.hidden_size
        self.dense_h_to_4h = nn.Linear(outer, inner * (1 + self.is_gated), bias=config.bias)
        self.dense_4h_to_h = nn.Linear(inner, outer, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.dense_h_to_4h(x)
        if self.is_gated:
            gate, value = inner.chunk(2, dim=-1)
            return self.dense_4h_to_h(F.silu(gate) * value)
        return self.dense_4h_to_h(F.gelu(inner, approximate="tanh"))


class AttentionHalf(nn.Module):
    """Returns the residual stream and its normalised form, both [B, L, D]."""

    def __init__(self, config: RetroConfig, shape: StackShape) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.input_layernorm = norm(config, shape.hidden_size)
        self.self_attention = SelfAttention(config, shape)
        self.post_attention_layernorm = norm(config, shape.hidden_size)

    def forward(
        self,
        x_BLD: Tensor,
        table: Table,
        mask: Mask | BlockMask,
        store: KeyValueStore | None = None,
    ) -> tuple[Tensor, Tensor]:
        added = self.self_attention(self.input_layernorm(x_BLD), table, mask, store)
        x_BLD = x_BLD + F.dropout(added, self.dropout, self.training)
        return x_BLD, self.post_attention_layernorm(x_BLD)


class FeedForwardHalf(nn.Module):
    """Takes what AttentionHalf returns. Without a context the cross-attention is skipped: retrieval
    off."""

    def __init__(
        self, config: RetroConfig, shape: StackShape, cross_attention: CrossAttention | None
    ) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.cross_attention = cross_attention
        if cross_attention is not None:
            self.post_inter_attention_layernorm = norm(config, shape.hidden_size)
        self.mlp = MLP(config, shape)

    def forward(self, x: Tensor, y: Tensor, context: Context | ProjectedContext | None) -> Tensor:
        if self.cross_attention is not None and context is not None:
            x = x + F.dropout(self.cross_attention(y, context), self.dropout, self.training)
            y = self.post_inter_attention_layernorm(x)
        return x + F.dropout(self.mlp(y), self.dropout, self.training)


class DecoderLayer(nn.Module):
    def __init__(self, config: RetroConfig, has_cross_attention: bool) -> None:
        super().__init__()
        shape, other = config.decoder_shape, config.encoder_shape.hidden_size
        self.attention_half = AttentionHalf(config, shape)
        cross = ChunkedCrossAttention(config, shape, other) if has_cross_attention else None
        self.feed_forward_half = FeedForwardHalf(config, shape, cross)

    def forward(
        self, x_BLD: Tensor, table: Table, mask: Mask | BlockMask, context: Context | None
    ) -> Tensor:
        x_BLD, y_BLD = self.attention_half(x_BLD, table, mask)
        return self.feed_forward_half(x_BLD, y_BLD, context)


class EncoderLayer(nn.Module):
    """Every neighbor is a sequence of its own; cross-attention folds the K neighbors of a chunk
    into one query axis, so that the chunk's states are projected once."""

    def __init__(self, config: RetroConfig, has_cross_attention: bool) -> None:
        super().__init__()
        shape, other = config.encoder_shape, config.hidden_size
        self.attention_half = AttentionHalf(config, shape)
        cross = CrossAttention(config, shape, other) if has_cross_attention else None
        self.feed_forward_half = FeedForwardHalf(config, shape, cross)

    def forward(
        self, x_NQD: Tensor, neighbors: int, table: Table, mask: Mask, context: Context
    ) -> Tensor:
        """[N, Q, D] with the tokens of `neighbors` neighbors one after the other in Q."""
        x = x_NQD.unflatten(1, (neighbors, -1)).flatten(0, 1)
        x, y = self.attention_half(x, table, mask)
        x, y = (part.unflatten(0, (-1, neighbors)).flatten(1, 2) for part in (x, y))
        return self.feed_forward_half(x, y, context)
