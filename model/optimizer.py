"""Adam over the trainable parameters, in the standard parametrisation or under muP, and the
learning-rate schedule."""

from dataclasses import dataclass
from math import cos, pi
from typing import Literal

import torch
from torch import nn
from torch.optim import Adam, AdamW

from model.config import ConfigError
from model.mup import WidthScale, WidthScales
from model.retro import is_retrieval_parameter


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule.

    Attributes:
        name: adamw; under muP (with a shape_file) muadamw, or muadam, whose weight decay is part of
            the gradient.
        lr: Peak learning rate; of the base model under muP.
        retrieval_lr_ratio: Learning rate of the retrieval parts as a fraction of that of the
            others, after a copy warm-up: text seldom rewards copying, and at the full rate it is
            unlearned.
        schedule: After linear warm-up: cosine or linear decay to the end, wsd (the peak is held,
            then a linear decay over the last decay_steps), or constant.
        min_lr_ratio: Learning rate at the end, as a fraction of the peak, in every group; without
            effect on a constant schedule.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Steps of decay of a wsd schedule, and of no other.
        weight_decay: Decay of weight matrices and embeddings; none on biases and norms.
        adam_beta1: Decay of the first moment.
        adam_beta2: Decay of the second moment.
        clip_grad: Largest global gradient norm.
    """

    name: Literal["adamw", "muadamw", "muadam"] = "adamw"
    lr: float = 6e-4
    retrieval_lr_ratio: float = 1.0
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    min_lr_ratio: float = 0.1
    warmup_steps: int = 100
    decay_steps: int | None = None
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    clip_grad: float = 1.0

    def __post_init__(self) -> None:
        if (self.decay_steps is not None) != (self.schedule == "wsd"):
            raise ConfigError(
                f"optim.decay_steps is {self.decay_steps} and optim.schedule {self.schedule}; "
                "decay_steps goes with wsd, and only with it"
            )


def build_optimizer(
    config: OptimConfig, model: nn.Module, scales: WidthScales | None = None
) -> Adam:
    """A group for each learning rate and weight decay that occur; a group's learning rate is
    config.lr * its `lr_mult`, and after a copy warm-up * its `lr_ratio`. Under muP `scales` are
    the width scales of the parameters.

    Raises:
        ConfigError: a muP optimizer without width scales, or another with them.
    """
    check_name(config, scales)
    groups: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = WidthScale(0, 1.0) if scales is None else scales[name]
            groups.setdefault(_settings(config, name, scale), []).append(parameter)
    options = [
        {
            "params": params,
            "lr": config.lr * lr_mult,
            "lr_mult": lr_mult,
            "lr_ratio": lr_ratio,
            "weight_decay": decay,
        }
        for (lr_mult, lr_ratio, decay), params in groups.items()
    ]
    optimizer = Adam if config.name == "muadam" else AdamW
    betas = (config.adam_beta1, config.adam_beta2)
    return optimizer(options, lr=config.lr, betas=betas, fused=True)


def check_name(config: OptimConfig, scales: WidthScales | None) -> None:
    """Raises ConfigError for a muP optimizer without width scales, or another with them."""
    if (scales is None) != (config.name == "adamw"):
        raise ConfigError(
            f"optim.name is {config.name} and shape_file is "
            f"{'not given' if scales is None else 'given'}; expected muadamw or muadam with a "
            "shape_file, adamw without"
        )


def _settings(config: OptimConfig, name: str, scale: WidthScale) -> tuple[float, float, float]:
    """(lr_mult, lr_ratio, weight decay). Decay within Adam is scaled against the learning rate, so
    that it does not vanish with width."""
    decay = 0.0 if is_exempt(name) else config.weight_decay
    if config.name == "muadam":
        decay *= scale.matrix_mult
    ratio = config.retrieval_lr_ratio if is_retrieval_parameter(name) else 1.0
    return 1 / scale.matrix_mult, ratio, decay


def is_exempt(name: str) -> bool:
    """Biases, gates and norm weights are not decayed."""
    return name.endswith(("bias", "gate")) or "layernorm" in name


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Of step 0 .. max_steps - 1: linear warm-up, then what the schedule says."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    first = config.warmup_steps
    if config.decay_steps is not None:
        first = max(first, max_steps - config.decay_steps)
    progress = min(1.0, max(0, step - first) / max(1, max_steps - first))
    if config.schedule == "constant":
        return config.lr
    remaining = 0.5 * (1 + cos(pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, lr: float, in_copy_warmup: bool = False
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"] * (1.0 if in_copy_warmup else group["lr_ratio"])
