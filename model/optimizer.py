"""AdamW over the trainable parameters and the learning-rate schedule."""

from dataclasses import dataclass
from math import cos, pi

import torch
from torch import nn
from torch.optim import AdamW


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule.

    Attributes:
        lr: Peak learning rate.
        min_lr_ratio: Learning rate at the end, as a fraction of the peak.
        warmup_steps: Steps of linear warm-up; then cosine decay to the end.
        weight_decay: Decoupled decay of weight matrices and embeddings; none on biases and norms.
        adam_beta1: Decay of the first moment.
        adam_beta2: Decay of the second moment.
        clip_grad: Largest global gradient norm.
    """

    lr: float = 6e-4
    min_lr_ratio: float = 0.1
    warmup_steps: int = 100
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    clip_grad: float = 1.0


def build_optimizer(config: OptimConfig, model: nn.Module) -> AdamW:
    """AdamW with a group for decayed parameters and one for the rest; no empty groups."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trainable if not is_exempt(name)]
    exempt = [p for name, p in trainable if is_exempt(name)]
    groups = [
        {"params": parameters, "weight_decay": decay, "lr_mult": 1.0}
        for parameters, decay in ((decayed, config.weight_decay), (exempt, 0.0))
        if parameters
    ]
    return AdamW(groups, lr=config.lr, betas=(config.adam_beta1, config.adam_beta2))


def is_exempt(name: str) -> bool:
    """Biases and norm weights are not decayed."""
    return name.endswith("bias") or "layernorm" in name


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Of step 0 .. max_steps - 1: linear warm-up, then cosine decay to min_lr_ratio of the peak."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    return config.lr * (
        config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + cos(pi * min(1.0, progress)))
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
