"""Coordinate check of muP: how large activations are after a few training steps, by width.

Under muP they do not depend on width; in the standard parametrisation some grow with it (Tensor
Programs V, figure 5). A mistake in the implementation shows here first.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from model.attention import CrossAttention, SelfAttention
from model.config import ConfigError, ModelConfig, RetroConfig
from model.head import Head
from model.initialization import initialize
from model.layers import MLP
from model.mup import BaseShapes, base_shapes, width_scales, with_mup
from model.optimizer import OptimConfig, build_optimizer
from model.retro import Retro

_WATCHED = (SelfAttention, CrossAttention, MLP, Head)
_BATCH, _NEIGHBORS = 4, 2


@dataclass(frozen=True)
class Coordinates:
    """Mean absolute value of what a part of a model gives, in step `step` of its training."""

    parametrization: str
    width: int
    step: int
    part: str
    size: float


def widened(model: ModelConfig, hidden_size: int) -> ModelConfig:
    """The same model with another width: hidden_size, ffn_hidden_size and numbers of heads in
    proportion, heads as wide as before.

    Raises:
        ConfigError: a number is no whole one any more.
    """
    sizes = {"hidden_size": model.hidden_size, "ffn_hidden_size": model.ffn_hidden_size}
    sizes |= {"num_attention_heads": model.num_attention_heads}
    if model.num_query_groups is not None:
        sizes |= {"num_query_groups": model.num_query_groups}
    if any(size * hidden_size % model.hidden_size for size in sizes.values()):
        raise ConfigError(
            f"width {hidden_size} instead of {model.hidden_size} leaves no whole numbers of "
            f"{sizes}; choose another width"
        )
    grown = {name: size * hidden_size // model.hidden_size for name, size in sizes.items()}
    return replace(model, **grown)


def check(
    model: ModelConfig,
    widths: Sequence[int],
    steps: int,
    lr: float,
    seed: int,
    chunk_size: int = 16,
    vocab_size: int = 512,
) -> list[Coordinates]:
    """Trains models of these widths under both parametrisations on one made-up batch; the base of
    muP is the first of the widths."""

    def of_width(width: int) -> RetroConfig:
        shape = asdict(widened(model, width))
        return RetroConfig(**shape, vocab_size=vocab_size, chunk_size=chunk_size)

    configs, delta = [of_width(width) for width in widths], of_width(2 * widths[0])
    shapes = base_shapes(configs[0], delta)
    found = []
    for config in configs:
        found += _train(config, None, steps, lr, seed)
        found += _train(config, shapes, steps, lr, seed)
    return found


def parametrized(
    config: RetroConfig, shapes: BaseShapes | None, optim: OptimConfig, seed: int
) -> tuple[Retro, Optimizer]:
    """A new model with its optimizer: under muP with base shapes, else in the standard
    parametrisation."""
    if shapes is None:
        model, scales = Retro(config), None
    else:
        model = Retro(with_mup(config, shapes))
        scales, optim = width_scales(model, shapes), replace(optim, name="muadamw")
    initialize(model, seed, scales)
    return model, build_optimizer(optim, model, scales)


def _train(
    config: RetroConfig, shapes: BaseShapes | None, steps: int, lr: float, seed: int
) -> list[Coordinates]:
    name = "sp" if shapes is None else "mup"
    model, optimizer = parametrized(config, shapes, OptimConfig(lr=lr, weight_decay=0.0), seed)
    sizes: dict[str, list[float]] = {}
    for part, module in model.named_modules():
        if isinstance(module, _WATCHED):
            module.register_forward_hook(_keep(sizes.setdefault(part, [])))
    batch = _batch(config, seed)
    found = []
    for step in range(steps):
        logits = model(*batch)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for part, values in sizes.items():
            size = float(np.mean(values))
            found.append(Coordinates(name, config.hidden_size, step, part, size))
            values.clear()
    return found


def _keep(sizes: list[float]) -> Any:
    def hook(_module: nn.Module, _given: Any, out: Tensor) -> None:
        sizes.append(out.detach().abs().mean().item())

    return hook


def _batch(config: RetroConfig, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens, mask, neighbors, mask), the same for all widths."""
    generator = torch.Generator().manual_seed(seed)
    chunks, m = 4, config.chunk_size
    draw = lambda *shape: torch.randint(1, config.vocab_size, shape, generator=generator)
    tokens, neighbors = draw(_BATCH, chunks * m), draw(_BATCH, chunks, _NEIGHBORS, 2 * m)
    return tokens, tokens > 0, neighbors, neighbors > 0


def growth(found: Sequence[Coordinates]) -> dict[str, dict[str, float]]:
    """By parametrisation and part: the exponent a of size ~ width^a in the last step."""
    last = max(c.step for c in found)
    series: dict[tuple[str, str], list[Coordinates]] = {}
    for c in found:
        if c.step == last:
            series.setdefault((c.parametrization, c.part), []).append(c)
    exponents: dict[str, dict[str, float]] = {}
    for (name, part), points in series.items():
        x, y = (
            [np.log2(v) for v in column] for column in zip(*((p.width, p.size) for p in points))
        )
        exponents.setdefault(name, {})[part] = float(np.polyfit(x, y, 1)[0])
    return exponents
