"""The presets are configurations of `jobs.pretrain` and have the sizes that they say."""

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from jobs.pretrain import PretrainConfig
from model.config import ModelConfig, RetroConfig
from model.flops import training_flops
from model.mup import meta_model
from model.retro import is_retrieval_parameter

FOLDER = Path(__file__).parents[2] / "jobs" / "configs"
GPT2, LLAMA, DEMO = 50257, 128256, 8192


def load(name, **changes):
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    shape = {k: tuple(v) if isinstance(v, list) else v for k, v in values["model"].items()}
    return ModelConfig(**(shape | changes)), values


def sizes(name, vocab_size):
    """(parameters of the plain decoder, all parameters)"""
    model, _ = load(name)
    config = RetroConfig(**vars(model), vocab_size=vocab_size)
    counts = {n: p.numel() for n, p in meta_model(config).named_parameters()}
    plain = sum(count for n, count in counts.items() if not is_retrieval_parameter(n))
    return plain, sum(counts.values())


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_preset_is_a_configuration_of_the_training_job(path):
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(PretrainConfig, as_group=False)
    given = ["--config", str(path), "--output_url=run", "--data.train_url=data"]
    parsed = parser.parse_args([*given, "--optim.lr=0.5"])
    assert parsed.model.hidden_size == load(path.stem)[0].hidden_size
    assert (parsed.optim.lr, parsed.output_url) == (0.5, "run")


@pytest.mark.parametrize(
    ("name", "vocab_size", "plain", "total"),
    [
        ("demo", DEMO, 2_113_792, 2_642_688),
        ("nemo_default", GPT2, 81_212_544, 116_657_280),
        ("150m", GPT2, 123_739_776, 147_372_672),
        ("420m", GPT2, 353_873_024, 412_671_104),
        ("1p3b", GPT2, 1_311_675_520, 1_546_712_192),
        ("llama_like", LLAMA, 1_235_814_400, 1_309_229_060),
    ],
)
def test_a_preset_has_so_many_parameters(name, vocab_size, plain, total):
    assert sizes(name, vocab_size) == (plain, total)


def test_every_preset_is_counted_above():
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert names == {"demo", "nemo_default", "150m", "420m", "1p3b", "llama_like"}


def test_operations_of_a_token_are_well_above_six_times_the_parameters_of_the_decoder():
    model, values = load("150m")
    config = RetroConfig(**vars(model), vocab_size=GPT2)
    length, neighbors = values["data"]["seq_length"], values["data"]["neighbors"]
    assert training_flops(config, length, neighbors) / length > 1.2 * 6 * 123_739_776
