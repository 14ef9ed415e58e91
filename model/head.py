"""From the decoder's last states to logits and losses."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import RetroConfig

_CELLS = 1 << 26


class Head(nn.Module):
    """logits = states W^T / output_width_mult + bias, where W is the embedding or, untied, a matrix
    of its own. Rows that only fill W up to a multiple are cut off."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = self.bias = None
        if not config.share_embeddings_and_output_weights:
            shape = (config.padded_vocab_size, config.hidden_size)
            self.weight = nn.Parameter(torch.empty(shape))
        if config.tokens_head_bias:
            self.bias = nn.Parameter(torch.zeros(config.padded_vocab_size))

    def forward(self, states_D: Tensor, embedding_VD: Tensor) -> Tensor:
        """[..., V] logits of states [..., D]."""
        if self.config.output_width_mult is not None:
            states_D = states_D / self.config.output_width_mult
        weight_VD = embedding_VD if self.weight is None else self.weight
        return F.linear(states_D, weight_VD, self.bias)[..., : self.config.vocab_size]

    def losses(self, states_nD: Tensor, embedding_VD: Tensor, labels_n: Tensor) -> Tensor:
        """[n] float32 cross-entropy of each label.

        Logits are made for so many tokens at a time that they take no more than 256 MB in float32,
        and again in the backward pass if there was more than one part.
        """
        rows = max(1, _CELLS // self.config.padded_vocab_size)
        parts = list(zip(states_nD.split(rows), labels_n.split(rows), strict=True))
        if len(parts) == 1:
            return self._losses(states_nD, embedding_VD, labels_n)
        found = [
            checkpoint(self._losses, states, embedding_VD, labels, use_reentrant=False)
            for states, labels in parts
        ]
        return torch.cat(found)  # type: ignore[arg-type]

    def _losses(self, states_nD: Tensor, embedding_VD: Tensor, labels_n: Tensor) -> Tensor:
        logits_nV = self(states_nD, embedding_VD)
        return F.cross_entropy(logits_nV.float(), labels_n, reduction="none")
