import pytest
import torch

from model.initialization import initialize, standard_deviation
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
