"""Self-attention of the decoder on CUDA: FlexAttention over the blocks of the mask that are not
empty. No table of all pairs of tokens is made, and what lies in other documents is not computed.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def block_mask(segments_BL: Tensor, tokens_mask_BL: Tensor) -> BlockMask:
    """The same as `model.retro.causal_mask`, by blocks: query may see key if it is not later, of
    the same document, and neither is a pad."""
    # One narrow number a token: the kernel looks it up for every pair of a tile, in registers.
    documents_BL = segments_BL.masked_fill(~tokens_mask_BL, -1).to(torch.int32)

    def may_see(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        document = documents_BL[b, q]
        return (q >= k) & (document == documents_BL[b, k]) & (document >= 0)

    batch, length = segments_BL.shape
    return create_block_mask(may_see, batch, None, length, length, device=segments_BL.device)


@lru_cache(maxsize=1)
def _fused() -> Callable[..., Any]:
    """One kernel; made on first use, because the compiler takes seconds to import."""
    return torch.compile(flex_attention, dynamic=False)


def attend_blocks(
    q_BHLP: Tensor, k_BGLP: Tensor, v_BGLP: Tensor, mask: BlockMask, scale: float, is_grouped: bool
) -> Tensor:
    """[B, H, L, P] softmax(scale q k^T) v; zeros for a query that may see no key."""
    is_alone = q_BHLP.is_cuda and not torch.compiler.is_compiling()
    attention = _fused() if is_alone else flex_attention
    out = attention(q_BHLP, k_BGLP, v_BGLP, block_mask=mask, scale=scale, enable_gqa=is_grouped)
    assert isinstance(out, Tensor)
    return out
