import pytest
import torch

from model.checkpoint import freeze_decoder
from model.config import ConfigError
from model.optimizer import OptimConfig, build_optimizer, learning_rate, set_learning_rate
from model.retro import is_retrieval_parameter
from tests.model.test_causality import tiny

CONFIG = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=4)


def test_learning_rate_rises_to_the_peak_and_falls_to_its_share():
    rates = [learning_rate(CONFIG, step, 20) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(0.55)
    assert rates[20] == pytest.approx(0.1)
    assert learning_rate(CONFIG, 99, 20) == pytest.approx(0.1)


def test_schedules_differ_after_the_warm_up():
    def rates(schedule, **more):
        config = OptimConfig(lr=2.0, min_lr_ratio=0.1, warmup_steps=4, schedule=schedule, **more)
        return [learning_rate(config, step, 24) for step in range(25)]

    linear, constant, wsd = rates("linear"), rates("constant"), rates("wsd", decay_steps=10)
    assert linear[:4] == constant[:4] == wsd[:4] == [0.5, 1.0, 1.5, 2.0]
    assert linear[14] == pytest.approx(1.1)
    assert linear[24] == wsd[24] == pytest.approx(0.2)
    assert set(constant[4:]) == {2.0}
    assert set(wsd[4:15]) == {2.0}
    assert wsd[19] == pytest.approx(1.1)


def test_steps_of_decay_belong_to_one_schedule():
    for options in ({"schedule": "wsd"}, {"decay_steps": 5}):
        with pytest.raises(ConfigError, match="decay_steps goes with wsd"):
            OptimConfig(**options)


def test_norms_and_biases_are_not_decayed_and_nothing_is_left_out():
    model = tiny()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, exempt = build_optimizer(CONFIG, model).param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert all(names[id(p)].endswith("weight") and p.ndim == 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in exempt["params"])
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)


def test_a_frozen_decoder_is_not_optimized():
    model = tiny()
    freeze_decoder(model)
    chosen = {
        id(p) for group in build_optimizer(CONFIG, model).param_groups for p in group["params"]
    }
    expected = {id(p) for name, p in model.named_parameters() if is_retrieval_parameter(name)}
    assert chosen == expected
    assert 0 < len(chosen) < len(list(model.parameters()))


def test_groups_keep_their_multiple_of_the_learning_rate():
    optimizer = build_optimizer(CONFIG, torch.nn.Linear(2, 2))
    optimizer.param_groups[0]["lr_mult"] = 0.5
    set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_retrieval_learns_at_its_own_rate_after_a_copy_warm_up():
    model = tiny()
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(OptimConfig(lr=1.0, retrieval_lr_ratio=0.25), model)
    for in_copy_warmup, slower in ((True, 0.5), (False, 0.125)):
        set_learning_rate(optimizer, 0.5, in_copy_warmup)
        for group in optimizer.param_groups:
            is_retrieval = {is_retrieval_parameter(names[id(p)]) for p in group["params"]}
            assert group["lr"] == (slower if is_retrieval.pop() else 0.5)
            assert not is_retrieval
