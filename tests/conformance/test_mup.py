"""muP against the golden tables: dimensions, learning rates, weight decay, initial values."""

import json
from collections import Counter

import pytest

from model.config import RetroConfig
from model.initialization import standard_deviation
from model.mup import base_shapes, meta_model, width_scales, with_mup
from model.nemo_names import nemo_name
from model.optimizer import OptimConfig, build_optimizer, is_exempt
from tests.conformance.golden import FOLDER, cases

SAME_NAME = (
    *("kv_channels", "dec_num_layers", "enc_num_layers"),
    *("version", "layernorm_epsilon", "vocab_size", "chunk_size"),
)


@pytest.fixture(params=cases("mup"))
def case(request):
    """(golden table, target model on the meta device, scales of its parameters)."""
    spec = json.loads((FOLDER / "mup" / f"{request.param}.json").read_text())
    common = spec["common"]
    base, delta, target = (
        RetroConfig(
            **{name: common[name] for name in SAME_NAME},
            **spec[width],
            dec_cross_attention=tuple(common["dec_cross_attention"]),
            enc_cross_attention=tuple(common["enc_cross_attention"]),
            make_vocab_size_divisible_by=1,
            init_method_std=spec["init_method_std"],
            eod_id=common["eos_id"],
        )
        for width in ("base", "delta", "target")
    )
    shapes = base_shapes(base, delta)
    model = meta_model(with_mup(target, shapes))
    return spec, shapes, model, width_scales(model, shapes)


def test_dimensions_multipliers_and_initial_values_are_golden(case):
    spec, shapes, model, scales = case
    config = model.config
    assert config.output_width_mult == pytest.approx(spec["output_width_mult"], rel=1e-9)
    assert 1 / config.output_width_mult == pytest.approx(spec["output_multiplier"], rel=1e-9)
    assert 1 / config.attention_scale == pytest.approx(spec["attention_score_divisor"], rel=1e-9)
    golden = {row["name"]: row for row in spec["parameters"]}
    names = {name: nemo_name(name, config) for name, _ in model.named_parameters()}
    assert set(names.values()) == golden.keys()
    for name, parameter in model.named_parameters():
        row, scale = golden[names[name]], scales[name]
        assert list(parameter.shape) == row["shape"]
        assert (scale.ninf, scale.width_mult) == (row["ninf"], pytest.approx(row["width_mult"]))
        assert 1 / scale.matrix_mult == pytest.approx(row["lr_mult"], rel=1e-9)
        assert is_exempt(name) == (row["wd_mult"] == 0)
        if row["init_std"]:  # null: stays zero; 0: a norm's weights, all 1
            found = standard_deviation(name, config, scale)
            assert found == pytest.approx(row["init_std"], rel=1e-9), name
    assert shapes["word_embeddings.weight"] == [None, spec["base"]["hidden_size"]]


def test_parameter_groups_are_golden(case):
    spec, _, model, scales = case
    given = spec["optimizer"]
    config = OptimConfig(given["name"], lr=given["lr"], weight_decay=given["weight_decay"])
    groups = build_optimizer(config, model, scales).param_groups
    found: Counter[tuple[float, float]] = Counter()
    for group in groups:
        assert group["lr"] == pytest.approx(config.lr * group["lr_mult"], rel=1e-12)
        found[round(group["lr"], 12), group["weight_decay"]] += len(group["params"])
    expected: Counter[tuple[float, float]] = Counter()
    for group in spec["param_groups"]:
        expected[round(group["lr"], 12), group["weight_decay"]] += group["parameters"]
    assert found == +expected
