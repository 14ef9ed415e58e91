"""Rotary positions: the first rotary_dim entries of each head are turned by an angle that grows
with the position.

Halves, not pairs: with u, v the first and second half of those entries, (u, v) -> (u cos - v sin, v
cos + u sin).
"""

import torch
from torch import Tensor

Table = tuple[Tensor, Tensor]


def rotary_table(positions: Tensor, rotary_dim: int, base: float) -> Table:
    """(cos, sin), both [L, rotary_dim / 2] float32, of integer positions [L]: angle = position *
    base^(-2k / rotary_dim)."""
    k = torch.arange(rotary_dim // 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[:, None] * base ** (-2.0 * k / rotary_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: Table) -> Tensor:
    """x [..., L, P] with its first rotary_dim entries turned; the rest passes."""
    cos, sin = (part.to(x.dtype) for part in table)
    half = cos.shape[-1]
    u, v, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [u * cos - v * sin, v * cos + u * sin]
    return torch.cat([*turned, rest] if rest.shape[-1] else turned, dim=-1)
