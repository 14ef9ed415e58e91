import json
from dataclasses import asdict, replace

import mup
import numpy as np
import pytest
import torch

from jobs import coord_check as coord_check_job
from jobs import mup_shapes
from model.config import ConfigError, ModelConfig, RetroConfig
from model.coord_check import check, growth, widened
from model.initialization import initialize, standard_deviation
from model.mup import (
    base_shapes,
    meta_model,
    read_shape_file,
    to_yaml,
    width_scales,
    with_mup,
)
from model.optimizer import OptimConfig, build_optimizer, set_learning_rate
from model.retro import Retro
from tests.model.test_families import MODERN

BASE = ModelConfig(
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=2,
    dec_num_layers=2,
    dec_cross_attention=(1,),
    enc_num_layers=1,
)
KNOWN = {"vocab_size": 50, "chunk_size": 4}
GATED = {**MODERN, "num_attention_heads": 8, "num_query_groups": 4, "cross_attention_gate": True}


def with_data(model, **changes):
    return RetroConfig(**(asdict(model) | changes), **KNOWN)


@pytest.fixture(params=[{}, GATED], ids=["nemo", "modern"])
def trio(request):
    """(base, delta, target): widths of 1, 1/2 and 3; the inner width grows by 4."""
    base = with_data(BASE, **request.param)
    delta, target = (with_data(widened(replace(BASE, **request.param), w)) for w in (64, 384))
    return base, delta, replace(target, ffn_hidden_size=1024)


@pytest.fixture
def theirs(trio):
    """The target with the shapes that the package mup gives its parameters."""
    base, delta, target = (Retro(config) for config in trio)
    mup.set_base_shapes(target, base, delta=delta, rescale_params=False)
    return target


def test_scales_are_those_of_the_package(trio, theirs):
    scales = width_scales(theirs, base_shapes(*trio[:2]))
    for name, parameter in theirs.named_parameters():
        shape = parameter.infshape
        expected = (shape.ninf(), shape.width_mult())
        assert (scales[name].ninf, scales[name].width_mult) == expected, name
    assert {scale.width_mult for scale in scales.values()} >= {3.0, 4.0}


def test_learning_rates_are_those_of_the_package(trio, theirs):
    scales = width_scales(theirs, base_shapes(*trio[:2]))
    for name, make in (("muadam", mup.MuAdam), ("muadamw", mup.MuAdamW)):
        config = OptimConfig(name, lr=0.01, weight_decay=0.0)
        expected = by_parameter(make(theirs.parameters(), lr=0.01, weight_decay=0.0), "lr")
        found = by_parameter(build_optimizer(config, theirs, scales), "lr")
        assert all(found[p] == pytest.approx(expected[p]) for p in theirs.parameters())


def test_decay_within_adam_is_that_of_the_package(trio, theirs):
    scales = width_scales(theirs, base_shapes(*trio[:2]))
    ours = build_optimizer(OptimConfig("muadam", weight_decay=0.1), theirs, scales)
    expected = by_parameter(mup.MuAdam(theirs.parameters(), weight_decay=0.1, lr=1), "weight_decay")
    found = by_parameter(ours, "weight_decay")
    assert all(found[p] in (0.0, pytest.approx(expected[p])) for p in found)
    assert max(found.values()) == pytest.approx(0.4)


def by_parameter(optimizer, key):
    return {p: group[key] for group in optimizer.param_groups for p in group["params"]}


def test_initial_values_are_those_of_the_package(trio, theirs):
    scales = width_scales(theirs, base_shapes(*trio[:2]))
    config = theirs.config
    for name, parameter in theirs.named_parameters():
        if parameter.ndim == 2:
            scaled = standard_deviation(name, config, scales[name])
            unscaled = scaled * scales[name].matrix_mult ** 0.5
            torch.manual_seed(0)
            mup.init.normal_(parameter, 0.0, unscaled)
            torch.manual_seed(0)
            expected = torch.empty_like(parameter).normal_(0.0, scaled)
            torch.testing.assert_close(parameter.detach(), expected, msg=name)


def test_schedules_multiply_learning_rates(trio, theirs):
    shapes = base_shapes(*trio[:2])
    optimizer = build_optimizer(OptimConfig("muadamw"), theirs, width_scales(theirs, shapes))
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5, 0.5 / 3, 0.5 / 4}


def test_at_base_width_muP_is_the_standard_parametrisation_bit_for_bit():
    """With heads of 64 and 12 layers, the numbers that are constants under muP."""
    shape = {"dec_num_layers": 12, "enc_num_layers": 12, "dec_cross_attention": (3, 7)}
    config = with_data(BASE, **shape)
    shapes = base_shapes(config, with_data(widened(replace(BASE, **shape), 64)))
    results = []
    for under_mup in (False, True):
        model = Retro(with_mup(config, shapes) if under_mup else config)
        scales = width_scales(model, shapes) if under_mup else None
        initialize(model, 0, scales)
        optim = OptimConfig("muadamw" if under_mup else "adamw", lr=0.01)
        optimizer = build_optimizer(optim, model, scales)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, 50, (2, 12), generator=generator)
        neighbors = torch.randint(1, 50, (2, 3, 2, 8), generator=generator)
        for _ in range(2):
            logits = model(tokens, tokens > 0, neighbors, neighbors > 0)
            logits.logsumexp(-1).sum().backward()
            optimizer.step()
        results.append([logits, *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("hidden_size", [128, 512])
def test_attention_scores_are_divided_by_head_width_over_8(hidden_size):
    config = with_data(replace(BASE, hidden_size=hidden_size), output_width_mult=2.0)
    assert config.attention_scale == 8 / (hidden_size / 2)
    assert replace(config, output_width_mult=None).attention_scale == (hidden_size / 2) ** -0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dec_num_layers": 3}, "differ in {'dec_num_layers': \\(2, 3\\)}"),
        ({"ffn_hidden_size": 256}, "ffn_hidden_size is 256 in base and in delta"),
        ({"kv_channels": 64, "num_attention_heads": 2}, "head width is 128 in base"),
        ({"hidden_size": 128, "num_attention_heads": 4, "kv_channels": 48}, "hidden_size is 128"),
    ],
)
def test_pairs_that_say_nothing_about_width_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        base_shapes(with_data(BASE), with_data(widened(BASE, 64), **change))


def test_a_shape_file_serves_any_depth_and_refuses_other_models(tmp_path):
    path = tmp_path / "shapes.bsh"
    with pytest.raises(FileNotFoundError, match=r"jobs\.mup_shapes writes one"):
        read_shape_file(str(path))
    mup_shapes.run(mup_shapes.MupShapesConfig(str(path), BASE, widened(BASE, 64)))
    shapes = read_shape_file(str(path))
    deep = with_data(widened(BASE, 256), dec_num_layers=5, dec_cross_attention=(2, 4))
    scales = width_scales(meta_model(deep), shapes)
    assert scales["layers.4.feed_forward_half.cross_attention.query.weight"].matrix_mult == 2
    assert with_mup(deep, shapes).output_width_mult == 2
    with pytest.raises(ConfigError, match=r"head\.weight, expected 2 dimensions"):
        with_mup(replace(deep, share_embeddings_and_output_weights=False), shapes)
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a map of parameter names"):
        read_shape_file(str(path))
    assert to_yaml(shapes).splitlines()[0] == "word_embeddings.weight: [null, 128]"


@pytest.mark.parametrize(("name", "has_shapes"), [("adamw", True), ("muadamw", False)])
def test_optimizers_and_shape_files_go_together(name, has_shapes):
    model = meta_model(with_data(BASE))
    shapes = base_shapes(with_data(BASE), with_data(widened(BASE, 64)))
    scales = width_scales(model, shapes) if has_shapes else None
    with pytest.raises(ConfigError, match=f"optim.name is {name}"):
        build_optimizer(OptimConfig(name), model, scales)


def test_activations_are_flat_under_muP_and_grow_without():
    model = coord_check_job.CoordCheckConfig("").model
    exponents = growth(check(model, [64, 128, 256, 512], steps=4, lr=0.002, seed=0))
    # The logits of initial weights fall with width under muP; what training adds does not.
    assert exponents["mup"].pop("head") < 0.1
    assert max(map(abs, exponents["mup"].values())) < 0.25
    assert max(exponents["sp"].values()) > 0.9


def test_the_coordinate_check_job_writes_table_and_plot(tmp_path):
    config = coord_check_job.CoordCheckConfig(str(tmp_path), widths=(1, 2), steps=1)
    result = coord_check_job.run(config)
    rows = json.loads((tmp_path / "coordinates.json").read_text())
    assert {row["width"] for row in rows} == {64, 128}
    assert np.isfinite([row["size"] for row in rows]).all()
    assert (tmp_path / "coordinates.png").stat().st_size > 5000
    assert result["exponents"].keys() == {"sp", "mup"}
    with pytest.raises(ValueError, match="expected two widths"):
        coord_check_job.run(replace(config, widths=(1,)))
