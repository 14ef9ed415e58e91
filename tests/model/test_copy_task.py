"""Retrieval works end to end when nothing but a neighbor can predict the next chunk."""

import numpy as np
import pytest
import torch

from model.config import RetroConfig
from model.initialization import initialize
from model.retro import Retro
from model.samples import Batch

SAMPLES, LENGTH, M, K, TOKENS = 16, 64, 8, 2, np.arange(2, 34)
CONFIG = RetroConfig(
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=2,
    kv_channels=64,
    dec_num_layers=2,
    dec_cross_attention=(1,),
    enc_num_layers=1,
    enc_cross_attention=(0,),
    init_method_std=0.1,
    vocab_size=34,
    eod_id=1,
    chunk_size=M,
)


def copy_batch(step):
    """Random tokens, so that only neighbors predict them: one of the neighbors of chunk u is chunk
    u followed by chunk u + 1, the other is random.
    """
    generator = np.random.default_rng(step)
    streams = generator.choice(TOKENS, (SAMPLES, LENGTH + M))
    chunks = LENGTH // M
    neighbors = generator.choice(TOKENS, (SAMPLES, chunks, K, 2 * M))
    holds = generator.integers(K, size=(SAMPLES, chunks))
    for b, u in np.ndindex(SAMPLES, chunks):
        neighbors[b, u, holds[b, u]] = streams[b, u * M : (u + 2) * M]
    counted = np.zeros((SAMPLES, LENGTH), bool)
    counted[:, M - 1 :] = True
    return Batch(
        tokens=streams[:, :LENGTH],
        labels=streams[:, 1 : LENGTH + 1],
        tokens_mask=np.ones((SAMPLES, LENGTH), bool),
        loss_mask=counted,
        neighbors=neighbors,
        neighbors_mask=np.ones_like(neighbors, dtype=bool),
    )


@pytest.fixture
def flushed_denormals():
    """As a trainer sets it; some libraries refuse to work with it."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.slow
def test_loss_with_retrieval_ends_far_below_the_loss_without(flushed_denormals):
    model = Retro(CONFIG)
    initialize(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def loss(step, retrieval):
        made = copy_batch(step).to("cpu")
        neighbors = (made.neighbors, made.neighbors_mask) if retrieval else (None, None)
        return model(made.tokens, made.tokens_mask, *neighbors, made.labels, made.loss_mask).mean()

    for step in range(250):
        loss(step, True).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        on, off = float(loss(1000, True)), float(loss(1000, False))
    assert on < 0.5 * np.log(len(TOKENS)) < 0.9 * off
