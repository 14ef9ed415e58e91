from dataclasses import replace

import numpy as np
import pytest
import torch

from model.config import ConfigError, RetroConfig
from model.copy_warmup import random_copies
from model.initialization import initialize
from model.retrieval_start import start_copying, start_retrieval_from_decoder
from model.retro import Retro, is_retrieval_parameter
from tests.model.test_causality import EOD, VOCABULARY, M, tiny


def test_the_pointer_raises_what_a_neighbor_says_comes_next():
    """What only the continuations hold becomes more likely where these are seen."""
    model = tiny(hidden_size=128, kv_channels=64, init_method_std=0.06)
    initialize(model, 0)
    start_retrieval_from_decoder(model)
    m = model.config.chunk_size
    tokens = torch.arange(2, 2 + m)[None]
    neighbors = torch.cat([tokens, torch.full((1, m), 9)], 1)[:, None, None].expand(1, 1, 2, -1)
    seen = (torch.ones_like(tokens).bool(), neighbors, torch.ones_like(neighbors).bool())
    off = model(tokens, seen[0])[0, -1].log_softmax(-1)
    on = model(tokens, *seen)[0, -1].log_softmax(-1)
    assert on[9] > off[9] + 1


def test_starting_retrieval_leaves_the_decoder_alone():
    model = tiny()
    initialize(model, 0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    start_retrieval_from_decoder(model)
    for name, parameter in model.named_parameters():
        assert is_retrieval_parameter(name) or torch.equal(parameter, before[name]), name


def test_a_pointer_that_copies_works_with_grouped_queries():
    shape = {"hidden_size": 32, "kv_channels": 32, "num_attention_heads": 2, "chunk_size": M}
    config = RetroConfig(
        **shape,
        num_query_groups=1,
        ffn_hidden_size=32,
        dec_num_layers=1,
        dec_cross_attention=(0,),
        enc_num_layers=1,
        vocab_size=VOCABULARY,
        eod_id=EOD,
    )
    model = Retro(config)
    initialize(model, 0)
    start_retrieval_from_decoder(model)
    context = torch.randn(1, M, 32)
    attention = model.layers[0].feed_forward_half.cross_attention
    values = attention.key_value(context)[..., 32:]
    torch.testing.assert_close(values, context)
    narrow = replace(config, enc_width_ratio=2.0)
    with pytest.raises(ConfigError, match=r"enc_width_ratio is 2\.0"):
        start_retrieval_from_decoder(Retro(narrow))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 2},
        {"num_attention_heads": 2, "dec_cross_attention": (1, 2), "enc_num_layers": 2},
        {"num_attention_heads": 2, "rotary_percentage": 1.0},
        {"num_attention_heads": 4, "kv_channels": 64, "num_query_groups": 2},
        {"num_attention_heads": 2, "normalization": "rmsnorm", "rope_theta": 500000.0},
        {"num_attention_heads": 2, "version": 1, "output_width_mult": 2.0},
    ],
    ids=str,
)
def test_an_untrained_model_copies_what_followed_the_token_in_a_neighbor(changes):
    words, chunk_size = 3000, 32
    model = tiny(
        **{"hidden_size": 128, "init_method_std": 0.02, "vocab_size": words} | changes,
        chunk_size=chunk_size,
    )
    start_copying(model)
    batch = random_copies(
        np.arange(3), 0, np.arange(2, words, dtype=np.int32), 4 * chunk_size, chunk_size, 2
    ).to("cpu")
    labels = batch.labels[batch.loss_mask]

    def share_right(neighbors):
        logits = model(batch.tokens, batch.tokens_mask, neighbors, batch.neighbors_mask)
        return float((logits.argmax(-1)[batch.loss_mask] == labels).float().mean())

    assert share_right(batch.neighbors) > 0.75
    assert share_right(batch.neighbors.roll(1, 0)) < 0.02


def test_decoders_of_both_kinds_start_silent():
    for changes in ({}, {"dec_cross_attention": ()}):
        model = tiny(hidden_size=32, **changes)
        start_copying(model)
        tokens = torch.arange(2, 10)[None]
        states = model.final_layernorm(model.word_embeddings(tokens))
        expected = model.head(states, model.word_embeddings.weight)
        torch.testing.assert_close(model(tokens, tokens > 0), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": False}, "bias is False"),
        ({"cross_attention_gate": True}, "cross_attention_gate True"),
        ({"enc_width_ratio": 0.5}, "enc_width_ratio is 0.5"),
        ({"rope_theta": 10.0}, "rope_theta 10.0 turn all 8 entries"),
    ],
    ids=str,
)
def test_what_cannot_start_by_copying_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        start_copying(tiny(**changes))
