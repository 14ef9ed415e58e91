"""Attention of the decoder and the retrieval encoder.

B batch, L sequence, C chunks, M chunk tokens, K neighbors, R neighbor tokens (2 M), N = B * C,
D width, H heads, P head width, Q queries, T keys.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import RetroConfig
from model.rotary import Table, rotate


def masked_attention(q_BHQP: Tensor, k_BHTP: Tensor, v_BHTP: Tensor, mask_BQT: Tensor) -> Tensor:
    """[B, H, Q, P] softmax(q k^T / sqrt(P)) v over the keys that the mask allows; zeros for a query
    that may see none."""
    has_key_BQ1 = mask_BQT.any(dim=-1, keepdim=True)
    allowed = (mask_BQT | ~has_key_BQ1)[:, None]
    out_BHQP = F.scaled_dot_product_attention(q_BHQP, k_BHTP, v_BHTP, attn_mask=allowed)
    return out_BHQP * has_key_BQ1[:, None].to(out_BHQP.dtype)


def _heads(x: Tensor, config: RetroConfig, parts: int) -> tuple[Tensor, ...]:
    """[B, L, H * parts * P] with rows ordered [head][part] -> `parts` tensors [B, H, L, P]."""
    x = x.unflatten(-1, (config.num_attention_heads, parts, config.head_dim))
    return tuple(part.transpose(1, 2) for part in x.unbind(-2))


def _join_heads(x_BHQP: Tensor) -> Tensor:
    return x_BHQP.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Causal or bidirectional: the mask decides."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_attention_heads * config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * width)
        self.dense = nn.Linear(width, config.hidden_size)

    def forward(self, x_BLD: Tensor, table: Table, mask_BLL: Tensor) -> Tensor:
        q, k, v = _heads(self.query_key_value(x_BLD), self.config, 3)
        return self.dense(
            _join_heads(masked_attention(rotate(q, table), rotate(k, table), v, mask_BLL))
        )


@dataclass(frozen=True)
class Context:
    """What a cross-attention attends to: states [N, T, D], which of them each query may see [N, Q,
    T], and positions."""

    states_NTD: Tensor
    mask_NQT: Tensor
    query_table: Table
    key_table: Table


class CrossAttention(nn.Module):
    """Encoder to chunk: queries are the tokens of all K neighbors of a chunk, folded into one
    axis."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_attention_heads * config.head_dim
        self.query = nn.Linear(config.hidden_size, width)
        self.key_value = nn.Linear(config.hidden_size, 2 * width)
        self.dense = nn.Linear(width, config.hidden_size)

    def forward(self, x_NQD: Tensor, context: Context) -> Tensor:
        return self.dense(self.attend(x_NQD, context))

    def attend(self, x_NQD: Tensor, context: Context) -> Tensor:
        """[N, Q, H * P] before the output projection."""
        (q,) = _heads(self.query(x_NQD), self.config, 1)
        k, v = _heads(self.key_value(context.states_NTD), self.config, 2)
        q, k = rotate(q, context.query_table), rotate(k, context.key_table)
        return _join_heads(masked_attention(q, k, v, context.mask_NQT))


class ChunkedCrossAttention(CrossAttention):
    """Decoder to neighbors (RETRO, section 2.4): the chunk_size queries from the last token of
    chunk u onwards attend to the encoded neighbors of chunk u. The first chunk_size - 1 positions
    attend to nothing and get the output bias only.
    """

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        m = self.config.chunk_size
        queries_NMD = windows(x_BLD, m).flatten(0, 1)
        attended = self.attend(queries_NMD, context)
        joined = attended.unflatten(0, (x_BLD.shape[0], -1)).flatten(1, 2)[
            :, : x_BLD.shape[1] - m + 1
        ]
        return self.dense(F.pad(joined, (0, 0, m - 1, 0)))


def windows(x: Tensor, chunk_size: int) -> Tensor:
    """[B, L, ...] -> [B, C, M, ...]: window u holds positions u M + M - 1 + (0..M-1), zeros beyond
    the sequence."""
    length = x.shape[1]
    chunks = length // chunk_size
    missing = chunks * chunk_size - (length - chunk_size + 1)
    shifted = x[:, chunk_size - 1 :]
    padding = torch.zeros_like(shifted[:, :1]).expand(-1, missing, *(-1 for _ in x.shape[2:]))
    return torch.cat([shifted, padding], dim=1).unflatten(1, (chunks, chunk_size))
