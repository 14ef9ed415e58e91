"""Losses of a model on a dataset, with retrieval on or off, over chosen tokens.

Sums, never means of means: callers divide by the tokens (loss), exponentiate (perplexity), or
divide by the bytes the tokens stand for (bits per byte).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.retro import Retro, document_segments
from model.samples import Samples, TensorBatch


def token_losses(
    model: Retro, batch: TensorBatch, retrieval: bool, mask: torch.Tensor
) -> torch.Tensor:
    """[n] float32 cross-entropy, in nats, of the n labels where mask [B, S] is True, in order."""
    neighbors = (batch.neighbors, batch.neighbors_mask) if retrieval else (None, None)
    return model(batch.tokens, batch.tokens_mask, *neighbors, batch.labels, mask)


@dataclass(frozen=True)
class LossSums:
    """Nats, tokens and bytes, over all scored tokens and over those before the first retrieval of
    their document."""

    loss: float
    tokens: float
    bytes: float
    loss_before: float
    tokens_before: float

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[float, ...]:
        return (self.loss, self.tokens, self.bytes, self.loss_before, self.tokens_before)

    def summary(self) -> dict[str, Any]:
        """loss (nats a token), ppl, bpb (bits a byte of text; null without bytes), and the loss
        before and after the first retrieval."""
        mean = self.loss / max(1.0, self.tokens)
        after = self.tokens - self.tokens_before
        return {
            "loss": mean,
            "ppl": exp(min(mean, 700.0)),
            "bpb": self.loss / log(2) / self.bytes if self.bytes else None,
            "tokens": int(self.tokens),
            "before_first_retrieval": {
                "loss": self.loss_before / self.tokens_before if self.tokens_before else None,
                "tokens": int(self.tokens_before),
            },
            "after_first_retrieval": {
                "loss": (self.loss - self.loss_before) / after if after else None,
                "tokens": int(after),
            },
        }


def before_first_retrieval(batch: TensorBatch, eod_id: int, chunk_size: int) -> torch.Tensor:
    """[B, S] positions whose document has no completed chunk in the sample yet: no neighbor can be
    visible there."""
    segments = document_segments(batch.tokens, eod_id)
    last_complete = (
        torch.arange(batch.tokens.shape[1], device=batch.tokens.device) + 1
    ) // chunk_size - 1
    chunk_start = last_complete.clamp_min(0) * chunk_size
    return (last_complete < 0) | (segments[:, chunk_start] != segments)


@torch.no_grad()
def loss_sums(
    model: Retro,
    reader: Samples,
    batches: Sequence[NDArray[np.int64]],
    retrieval: bool,
    device: torch.device | str = "cpu",
    scored: NDArray[np.bool_] | None = None,
    byte_counts: NDArray[np.float64] | None = None,
) -> LossSums:
    """Sums over the samples numbered in `batches`; a number of -1 stands for an empty place (ranks
    keep step).

    Args:
        scored: [tokens] positions of the dataset's token stream that count as labels; all by
            default.
        byte_counts: [tokens] bytes of text that each token of the stream stands for; without
            it bytes are 0.
    """
    total = LossSums(0, 0, 0, 0, 0)
    for numbers in batches:
        batch = reader.read(np.maximum(numbers, 0)).to(device)
        counted = np.maximum(numbers, 0)
        mask = batch.loss_mask & torch.from_numpy(numbers >= 0).to(device)[:, None]
        if scored is not None:
            chosen = _of_labels(scored, counted, reader)
            mask &= torch.from_numpy(chosen).to(device)
        losses = token_losses(model, batch, retrieval, mask).double()
        before = before_first_retrieval(batch, model.config.eod_id, model.config.chunk_size)[mask]
        lengths = 0.0
        if byte_counts is not None:
            lengths = _of_labels(byte_counts, counted, reader)[mask.cpu().numpy()].sum()
        total += LossSums(
            float(losses.sum()),
            float(mask.sum()),
            float(lengths),
            float(losses[before].sum()),
            float(before.sum()),
        )
    return total


def _of_labels(values: NDArray[Any], numbers: NDArray[np.int64], reader: Samples) -> NDArray[Any]:
    """[B, S] the values, of a dataset's tokens, of the labels of each position; 0 beyond the
    stream."""
    first = reader.first_token + numbers[:, None] * reader.seq_length
    positions = first + np.arange(1, reader.seq_length + 1)
    inside = positions < len(values)
    return np.where(inside, values[np.where(inside, positions, 0)], 0).astype(values.dtype)


def batches_of(
    numbers: NDArray[np.int64], batch_size: int, rank: int = 0, world_size: int = 1
) -> list[NDArray[np.int64]]:
    """Sample numbers in batches, dealt to ranks; every rank gets equally many equal batches, filled
    up with -1."""
    per_round = batch_size * world_size
    rounds = -(-len(numbers) // per_round)
    padded = np.full(rounds * per_round, -1, np.int64)
    padded[: len(numbers)] = numbers
    return list(padded.reshape(rounds, world_size, batch_size)[:, rank])
