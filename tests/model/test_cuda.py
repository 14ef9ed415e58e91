"""On a CUDA device the model, its attention by blocks, its compiled layers and a training run
compute what they compute on a CPU."""

import copy

import pytest
import torch

from jobs import pretrain
from model.config import RetroConfig
from model.initialization import initialize
from model.parallel import compile_layers
from model.retro import Retro
from tests.model.test_families import FAMILIES
from tests.training_job import STEPS, job, losses, plain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VOCABULARY, EOD, PAD, M, K, LENGTH = 300, 1, 0, 16, 2, 208


def build(**changes):
    shape = {
        "hidden_size": 128,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        "dec_num_layers": 4,
        "dec_cross_attention": (1, 3),
        "enc_num_layers": 2,
        "enc_cross_attention": (0,),
        "init_method_std": 0.1,
        "vocab_size": VOCABULARY,
        "eod_id": EOD,
        "chunk_size": M,
    }
    model = Retro(RetroConfig(**(shape | changes)))
    initialize(model, 0)
    return model


def batch(device):
    """Two samples with ends of documents, pads and missing neighbors."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, VOCABULARY, (2, LENGTH), generator=generator)
    tokens[0, 37], tokens[0, 38:48] = EOD, PAD
    tokens[1, 150] = EOD
    neighbors = torch.randint(2, VOCABULARY, (2, LENGTH // M, K, 2 * M), generator=generator)
    mask = torch.rand(neighbors.shape, generator=generator) > 0.1
    mask[0, 3] = False
    labels = tokens.roll(-1, 1)
    counted = (tokens != PAD) & (labels != PAD)
    return [x.to(device) for x in (tokens, tokens != PAD, neighbors, mask, labels, counted)]


def step(model, device, dtype=torch.float32):
    """Losses and gradients, on the CPU."""
    model = copy.deepcopy(model).to(device, dtype)
    found = model(*batch(device))
    found.mean().backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters()}
    return found.detach().float().cpu(), gradients


def distance(found, expected):
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reset", [True, False])
def test_losses_and_gradients_are_those_of_the_cpu(family, reset):
    model = build(reset_attention_mask=reset, **family)
    expected, found = step(model, "cpu"), step(model, "cuda")
    assert distance(found[0], expected[0]) < 1e-5
    for name, gradient in expected[1].items():
        assert distance(found[1][name], gradient) < 1e-3, name


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_compute_the_same(family):
    model = build(**family).cuda()
    expected = model(*batch("cuda")).detach()
    compile_layers(model)
    found = model(*batch("cuda"))
    found.mean().backward()
    assert distance(found.detach(), expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near(family):
    model = build(**family)
    expected, found = step(model, "cuda"), step(model, "cuda", torch.bfloat16)
    assert distance(found[0], expected[0]) < 2e-2
    flat = [torch.cat([g.flatten() for g in grads.values()]) for _, grads in (expected, found)]
    assert distance(flat[1], flat[0]) < 0.1


@pytest.mark.parametrize("changes", [{}, plain()], ids=["retrieval", "plain"])
def test_a_run_has_the_losses_of_a_run_on_the_cpu_and_continues(changes, data, tmp_path):
    pretrain.run(job(data, tmp_path / "cpu", **changes))
    on_gpu = {"device": "cuda", **changes}
    stopped = job(data, tmp_path / "cuda", trainer__stop_after_steps=3, **on_gpu)
    assert pretrain.run(stopped)["stopped"]
    pretrain.run(job(data, tmp_path / "cuda", **on_gpu))
    expected, found = losses(tmp_path / "cpu"), losses(tmp_path / "cuda")
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    assert max(abs(found[s] - expected[s]) for s in expected) < 1e-3


def test_a_compiled_run_in_bfloat16_learns(data, tmp_path):
    parallel = {"parallel__precision": "bf16", "parallel__compile": True}
    run = job(data, tmp_path / "run", device="cuda", trainer__max_steps=12, **parallel)
    pretrain.run(run)
    found = losses(tmp_path / "run")
    assert found[12] < found[1] - 0.3
