import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.flops import describe, forward_flops, training_flops
from tests.model.test_causality import M, tiny
from tests.model.test_families import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [32, 64])
@pytest.mark.parametrize("neighbors", [0, 2])
@pytest.mark.parametrize(
    "change",
    [{}, {"enc_num_layers": 2, "enc_cross_attention": ()}, {"dec_cross_attention": (0, 2)}],
    ids=str,
)
def test_closed_form_counts_what_is_computed(family, length, neighbors, change):
    model = tiny(**(family | {"hidden_size": 64, "make_vocab_size_divisible_by": 1} | change))
    tokens = torch.randint(2, 20, (1, length))
    given = []
    if neighbors:
        shown = torch.randint(2, 20, (1, length // M, neighbors, 2 * M))
        given = [shown, torch.ones_like(shown, dtype=torch.bool)]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens > 0, *given).sum().backward()
    expected = training_flops(model.config, length, neighbors)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.005)


def test_shares_of_the_parts_add_up():
    config = tiny().config
    parts = forward_flops(config, 32, 2)
    assert sum(parts.values()) * 3 == training_flops(config, 32, 2)
    assert forward_flops(config, 32, 0)["encoder MLPs"] == 0
    said = describe(config, 32, 2)
    assert "GFLOP a token" in said
    shares = [float(part.rsplit(" ", 1)[1].rstrip("%")) for part in said.split(", ")]
    assert sum(shares) == pytest.approx(100, abs=0.5)
