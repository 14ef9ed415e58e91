"""Transformer layers, each made of two halves so that the retrieval encoder can run between them.

    x += self_attention(input_layernorm(x));  y = post_attention_layernorm(x)        AttentionHalf
    [x += cross_attention(y);                 y = post_inter_attention_layernorm(x)] FeedForwardHalf
    x += mlp(y)

Shape letters as in `model/attention.py`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import ChunkedCrossAttention, Context, CrossAttention, SelfAttention
from model.config import RetroConfig
from model.rotary import Table


class MLP(nn.Module):
    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.ffn_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class AttentionHalf(nn.Module):
    """Returns the residual stream and its normalised form, both [B, L, D]."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(
            config.hidden_size, eps=config.layernorm_epsilon
        )

    def forward(self, x_BLD: Tensor, table: Table, mask_BLL: Tensor) -> tuple[Tensor, Tensor]:
        x_BLD = x_BLD + self.self_attention(self.input_layernorm(x_BLD), table, mask_BLL)
        return x_BLD, self.post_attention_layernorm(x_BLD)


class FeedForwardHalf(nn.Module):
    """Takes what AttentionHalf returns. Without a context the cross-attention is skipped: retrieval
    off."""

    def __init__(self, config: RetroConfig, cross_attention: CrossAttention | None) -> None:
        super().__init__()
        self.cross_attention = cross_attention
        if cross_attention is not None:
            self.post_inter_attention_layernorm = nn.LayerNorm(
                config.hidden_size, eps=config.layernorm_epsilon
            )
        self.mlp = MLP(config)

    def forward(self, x: Tensor, y: Tensor, context: Context | None) -> Tensor:
        if self.cross_attention is not None and context is not None:
            x = x + self.cross_attention(y, context)
            y = self.post_inter_attention_layernorm(x)
        return x + self.mlp(y)


class DecoderLayer(nn.Module):
    def __init__(self, config: RetroConfig, has_cross_attention: bool) -> None:
        super().__init__()
        self.attention_half = AttentionHalf(config)
        self.feed_forward_half = FeedForwardHalf(
            config, ChunkedCrossAttention(config) if has_cross_attention else None
        )

    def forward(
        self, x_BLD: Tensor, table: Table, mask_BLL: Tensor, context: Context | None
    ) -> Tensor:
        x_BLD, y_BLD = self.attention_half(x_BLD, table, mask_BLL)
        return self.feed_forward_half(x_BLD, y_BLD, context)


class EncoderLayer(nn.Module):
    """Every neighbor is a sequence of its own; cross-attention folds the K neighbors of a chunk
    into one query axis, so that the chunk's states are projected once."""

    def __init__(self, config: RetroConfig, has_cross_attention: bool) -> None:
        super().__init__()
        self.attention_half = AttentionHalf(config)
        self.feed_forward_half = FeedForwardHalf(
            config, CrossAttention(config) if has_cross_attention else None
        )

    def forward(self, x_NKRD: Tensor, table: Table, mask_NKRR: Tensor, context: Context) -> Tensor:
        neighbors = x_NKRD.shape[1]
        x, y = self.attention_half(x_NKRD.flatten(0, 1), table, mask_NKRR.flatten(0, 1))
        fold = (-1, neighbors)
        x, y = (part.unflatten(0, fold).flatten(1, 2) for part in (x, y))
        return self.feed_forward_half(x, y, context).unflatten(1, (neighbors, -1))
