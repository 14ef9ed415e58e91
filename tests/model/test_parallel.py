"""What is applied to a model changes its costs, not its function."""

import pytest
import torch

from model.parallel import checkpoint_activations, compile_layers
from tests.model.test_causality import PAD, sample, tiny
from tests.model.test_families import FAMILIES


def gradients(model):
    model.zero_grad()
    torch.manual_seed(0)
    tokens, neighbors, neighbors_mask = sample(22)
    mask = tokens != PAD
    losses = model(tokens, mask, neighbors, neighbors_mask, tokens.roll(-1, 1), mask)
    losses.sum().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def kept_bytes(model):
    """Of activations kept for the backward pass."""
    kept = []

    def pack(tensor):
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients(model)
    return sum(kept)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_recomputed_activations_give_the_same_gradients_for_less_memory(kind):
    changes = {"hidden_dropout": 0.1, "normalization": kind, "dec_num_layers": 4}
    model = tiny(**changes).train()
    names = [name for name, _ in model.named_parameters()]
    expected, size = gradients(model), kept_bytes(model)
    for layers in ("encoder", "full"):
        other = tiny(**changes).train()
        other.load_state_dict(model.state_dict())
        checkpoint_activations(other, layers)
        assert [name for name, _ in other.named_parameters()] == names
        losses, found = gradients(other)
        assert torch.equal(losses, expected[0])
        assert all(torch.equal(found[name], grad) for name, grad in expected[1].items())
        smaller = kept_bytes(other)
        assert smaller < size
        size = smaller


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", ["none", "full"])
def test_layers_compile_whole_and_compute_the_same(layers, family):
    """Traced without a break and differentiated by the compiler's front end; its back end for this
    machine would compile for minutes."""
    model, compiled = tiny(**family).train(), tiny(**family).train()
    compiled.load_state_dict(model.state_dict())
    checkpoint_activations(compiled, layers)
    compile_layers(compiled, backend="aot_eager", fullgraph=True)
    losses, expected = gradients(model)
    found, other = gradients(compiled)
    torch.testing.assert_close(found, losses)
    for name, grad in expected.items():
        torch.testing.assert_close(other[name], grad, msg=name, rtol=1e-4, atol=1e-6)
