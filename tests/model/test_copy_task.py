"""Retrieval works end to end when nothing but a neighbor can predict the next chunk."""

import numpy as np
import pytest
import torch

from model.config import RetroConfig
from model.copy_task import copy_batch
from model.initialization import initialize
from model.retro import Retro

M, K, LENGTH, TOKENS = 8, 2, 64, np.arange(2, 34)
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


def batch(step, max_shift=0):
    numbers = np.arange(step * 16, step * 16 + 16)
    return copy_batch(numbers, LENGTH, M, K, TOKENS, max_shift, seed=0)


def test_samples_depend_on_their_numbers_only():
    first, again = batch(3), batch(3)
    assert np.array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens, batch(4).tokens)


@pytest.mark.parametrize("max_shift", [0, 3])
def test_one_neighbor_of_each_chunk_holds_the_chunk_and_the_next(max_shift):
    made = batch(0, max_shift)
    assert made.neighbors is not None
    for stream, neighbors in zip(made.tokens, made.neighbors, strict=True):
        for u in range(LENGTH // M - 1):
            text = stream[u * M + max_shift : (u + 2) * M - max_shift].tolist()
            windows = (
                neighbor[i : i + len(text)].tolist()
                for neighbor in neighbors[u]
                for i in range(2 * max_shift + 1)
            )
            assert text in windows


@pytest.mark.slow
def test_loss_with_retrieval_ends_far_below_the_loss_without():
    model = Retro(CONFIG)
    initialize(model, 0)
    torch.set_flush_denormal(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def loss(step, retrieval):
        made = batch(step).to("cpu")
        neighbors = (made.neighbors, made.neighbors_mask) if retrieval else (None, None)
        return model(made.tokens, made.tokens_mask, *neighbors, made.labels, made.loss_mask).mean()

    for step in range(250):
        loss(step, True).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        on, off = float(loss(1000, True)), float(loss(1000, False))
    assert on < 0.5 * np.log(len(TOKENS)) < 0.9 * off
