import pytest
import torch

from model.initialization import initialize, standard_deviation, start_retrieval_from_decoder
from model.retro import is_retrieval_parameter
from tests.model.test_causality import tiny


def test_weights_do_not_depend_on_what_else_the_model_has():
    retro, plain = tiny(), tiny(dec_cross_attention=())
    initialize(retro, 3)
    initialize(plain, 3)
    weights = dict(retro.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in plain.named_parameters())
    initialize(plain, 4)
    assert not torch.equal(plain.word_embeddings.weight, retro.word_embeddings.weight)


def test_spread_of_weights_is_as_documented():
    model = tiny(hidden_size=256, ffn_hidden_size=512)
    initialize(model, 0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "layernorm" in name:
            assert parameter.eq(1).all(), name
        elif parameter.numel() > 10000:
            assert float(parameter.detach().std()) == pytest.approx(
                standard_deviation(name, model.config), rel=0.05
            )


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
