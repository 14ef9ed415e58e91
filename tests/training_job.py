"""A training job on the small dataset, and what it left."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from jobs.pretrain import PretrainConfig
from model.checkpoint import CheckpointConfig, latest_checkpoint, load_tensors
from model.config import ModelConfig
from model.metrics import MetricsConfig
from model.optimizer import OptimConfig
from model.trainer import TrainerConfig
from model.training_data import DataConfig

STEPS = 6
PARTS = {
    "data": {},
    "model": {
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "dec_num_layers": 3,
        "dec_cross_attention": (1,),
        "enc_num_layers": 1,
        "enc_cross_attention": (0,),
    },
    "trainer": {"max_steps": STEPS, "global_batch_size": 8, "micro_batch_size": 1},
    "optim": {"lr": 3e-3, "warmup_steps": 2},
    "checkpoint": {"interval": 2},
    "metrics": {"interval": 1, "tensorboard": False},
    "parallel": {},
}


def job(data, output, **changes):
    """A PretrainConfig; changes are named part__option, or option for those of the job itself."""
    options = {name: dict(values) for name, values in PARTS.items()}
    options["data"] = {
        "train_url": data.training.url,
        "train_map_url": data.map.url,
        "retrieval_url": data.retrieval.url,
        "seq_length": 64,
    }
    whole = {}
    for name, value in changes.items():
        part, _, option = name.partition("__")
        (options[part] if option else whole)[option or part] = value
    config = PretrainConfig(
        output_url=str(output),
        data=DataConfig(**options["data"]),
        model=ModelConfig(**options["model"]),
        trainer=TrainerConfig(**options["trainer"]),
        optim=OptimConfig(**options["optim"]),
        checkpoint=CheckpointConfig(**options["checkpoint"]),
        metrics=MetricsConfig(**options["metrics"]),
    )
    config = replace(config, parallel=replace(config.parallel, **options["parallel"]))
    return replace(config, **whole)


def plain(**changes):
    """Changes that make the job train a plain decoder."""
    maps = {"data__train_map_url": None, "data__retrieval_url": None}
    return {**maps, "model__dec_cross_attention": (), **changes}


def metrics(output):
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def losses(output):
    return {line["step"]: line["loss"] for line in metrics(output) if "loss" in line}


def tensors(output):
    """Weights and optimizer state of the newest checkpoint, by name."""
    return load_tensors(latest_checkpoint(str(output)))


def assert_equal_tensors(found, expected):
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]
