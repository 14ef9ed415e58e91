"""Losses of a model on samples, with retrieval on or off: their sums, and those of every chunk.

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
from model.samples import SampleReader, Samples, TensorBatch


def token_losses(
    model: Retro, batch: TensorBatch, retrieval: bool, mask: torch.Tensor
) -> torch.Tensor:
    """[n] float32 cross-entropy, in nats, of the n labels where mask [B, S] is True, in order."""
    neighbors = (batch.neighbors, batch.neighbors_mask) if retrieval else (None, None)
    return model(batch.tokens, batch.tokens_mask, *neighbors, batch.labels, mask)


@dataclass(frozen=True)
class LossSums:
    """Nats and tokens, over all scored tokens and over those before the first retrieval of their
    document; bytes of text that all of them stand for."""

    loss: float
    tokens: float
    loss_before: float
    tokens_before: float
    bytes: float = 0.0

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
) -> NDArray[np.float64]:
    """[4] loss, tokens, loss_before, tokens_before over the samples numbered in `batches`; a number
    of -1 stands for an empty place (ranks keep step)."""
    total = np.zeros(4)
    for numbers in batches:
        batch = reader.read(np.maximum(numbers, 0)).to(device)
        mask = batch.loss_mask & torch.from_numpy(numbers >= 0).to(device)[:, None]
        total += _of_labels(model, batch, retrieval, mask).sum(axis=1)
    return total


def _of_labels(
    model: Retro, batch: TensorBatch, retrieval: bool, mask: torch.Tensor
) -> NDArray[np.float64]:
    """[4, n] loss, 1, and both again for labels before the first retrieval, else 0."""
    losses = token_losses(model, batch, retrieval, mask).double()
    before = before_first_retrieval(batch, model.config.eod_id, model.config.chunk_size)[mask]
    rows = [losses, torch.ones_like(losses), losses * before, before.double()]
    return torch.stack(rows).cpu().numpy()


@torch.no_grad()
def chunk_losses(
    model: Retro,
    reader: SampleReader,
    batches: Sequence[NDArray[np.int64]],
    retrieval: bool,
    scored: NDArray[np.bool_],
    byte_counts: NDArray[np.float64],
    device: torch.device | str = "cpu",
) -> NDArray[np.float64]:
    """[5, num_chunks of the dataset] the sums of `loss_sums`, and bytes, by the chunk of the label.

    Samples overlap if the reader's stride is shorter than they are: each label counts in the first
    sample that holds it, where it has at least seq_length - stride tokens of context (but for the
    first sample).

    Args:
        batches: Numbers of samples; -1 stands for an empty place.
        scored: [tokens] positions of the dataset's token stream that count as labels.
        byte_counts: [tokens] bytes of text that each token of the stream stands for.
    """
    num_chunks = reader.dataset.num_chunks
    sums = np.zeros((5, num_chunks))
    for numbers in batches:
        mask, positions = scored_labels(reader, np.maximum(numbers, 0), scored)
        batch = reader.read(np.maximum(numbers, 0))
        mask &= batch.loss_mask & (numbers >= 0)[:, None]
        labels = positions[mask]
        moved = batch.to(device)
        values = _of_labels(model, moved, retrieval, torch.from_numpy(mask).to(device))
        chunks = labels // reader.dataset.chunk_size
        for row, each in zip(sums, [*values, byte_counts[labels]], strict=True):
            row += np.bincount(chunks, each, num_chunks)
    return sums


def scored_labels(
    reader: SampleReader, numbers: NDArray[np.int64], scored: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """([B, S] labels that count in these samples, [B, S] their places in the dataset's stream)."""
    labels = np.arange(1, reader.seq_length + 1)
    positions = reader.first_token + numbers[:, None] * reader.stride + labels
    inside = positions < len(scored)
    is_first_time = (numbers[:, None] == 0) | (labels > reader.seq_length - reader.stride)
    return is_first_time & inside & scored[np.where(inside, positions, 0)], positions


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
