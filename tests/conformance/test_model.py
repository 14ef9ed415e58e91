"""The whole model against the golden forward pass, loss and gradients of every parameter."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from model.config import RetroConfig
from model.nemo_names import nemo_name
from model.retro import Retro
from tests.conformance.golden import FOLDER, cases

ROOT = FOLDER / "model"
SAME_NAME = (
    *("hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "dec_num_layers"),
    *("enc_num_layers", "version", "layernorm_epsilon", "vocab_size", "chunk_size"),
)


@pytest.fixture(params=cases("model"))
def case(request):
    """(name, model with the golden weights, inputs, golden outputs)."""
    spec = json.loads((ROOT / f"{request.param}.json").read_text())
    files = [np.load(ROOT / f"{request.param}.{kind}.npz") for kind in ("inputs", "outputs")]
    weights = np.load(ROOT / f"{request.param}.weights.npz")
    config = RetroConfig(
        **{name: spec[name] for name in SAME_NAME},
        dec_cross_attention=tuple(spec["dec_cross_attention"]),
        enc_cross_attention=tuple(spec["enc_cross_attention"]),
        make_vocab_size_divisible_by=1,
        reset_cross_attention=False,
        eod_id=spec["eos_id"],
    )
    model = Retro(config)
    renamed = {name: weights[nemo_name(name, config)] for name in model.state_dict()}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in renamed.items()})
    assert sum(p.numel() for p in model.parameters()) == spec["parameter_count"]
    return request.param, model, *files


def keep_intermediates(model):
    """Filled by the next forward pass: the states that the encoder reads, and what it made."""
    made = {}
    split = model.decoder_layers[model.config.split_layer].attention_half
    split.register_forward_hook(lambda *a: made.update(h_stream=a[2][1].detach().numpy()))
    model.encoder.register_forward_hook(
        lambda *a: made.update(encoder_output=a[2].detach().numpy())
    )
    return made


def test_forward_loss_and_gradients_are_golden(case):
    name, model, inputs, golden = case
    made = keep_intermediates(model)
    names = ("tokens", "tokens_mask", "retrieved_ids", "retrieved_mask", "labels", "loss_mask")
    given = {name: torch.from_numpy(inputs[name]) for name in names}
    *arguments, labels, loss_mask = given.values()
    logits = model(*arguments)
    # Rows of pads are no outputs: nothing reads them.
    mask = inputs["tokens_mask"]
    np.testing.assert_allclose(logits.detach().numpy()[mask], golden["logits"][mask], atol=5e-5)
    token_loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    token_loss = token_loss.view(labels.shape)
    close = {"rtol": 0, "atol": 5e-5}
    expected = golden["token_loss"][mask]
    np.testing.assert_allclose(token_loss.detach().numpy()[mask], expected, **close)
    if (ROOT / f"{name}.intermediate.npz").exists():
        between = np.load(ROOT / f"{name}.intermediate.npz")
        masks = {"h_stream": mask, "encoder_output": inputs["retrieved_mask"]}
        for part, chosen in masks.items():
            found = made[part].reshape(between[part].shape)[chosen]
            np.testing.assert_allclose(found, between[part][chosen], **close)
    loss = (token_loss * loss_mask).sum() / loss_mask.sum()
    np.testing.assert_allclose(loss.item(), golden["loss"], atol=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = golden[f"grad.{nemo_name(name, model.config)}"]
        difference = np.abs(parameter.grad.numpy() - expected).max()
        assert difference <= 5e-5 * np.abs(expected).max() + 1e-7, name
