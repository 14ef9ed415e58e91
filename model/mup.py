"""muP (Tensor Programs V, arXiv 2203.03466): hyper-parameters found on a narrow model hold for a
wide one.

A shape file says which dimensions of each parameter grow with width, and their size in a base
model. What follows from it is a table of plain numbers by parameter name, which sharding cannot
lose:

    ninf         dimensions that grow with width
    width_mult   size of the last of them / its size in the base model; 1 if there is none

    initial std          * width_mult^(-1/2)  if ninf = 2  (`model/initialization.py`)
    learning rate        / width_mult         if ninf = 2  (`model/optimizer.py`)
    logits               states / width_mult of the embedding
    attention scores     q k / (head_dim / 8) instead of / sqrt(head_dim)

Shape files are YAML as the package mup 1.0.0 writes them, name: [size or null, ...], except that
layers are written once, as `layers.*`: they do not depend on depth.
"""

import re
from dataclasses import asdict, dataclass, replace

import torch
import yaml
from torch import nn

from etl.storage import filesystem_of, read_bytes
from model.config import ConfigError, RetroConfig
from model.retro import Retro

BaseShapes = dict[str, list[int | None]]
_WIDTHS = {
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
}


@dataclass(frozen=True)
class WidthScale:
    """How a parameter scales with width."""

    ninf: int
    width_mult: float

    @property
    def matrix_mult(self) -> float:
        """width_mult of a matrix both of whose dimensions grow; 1 for every other parameter."""
        return self.width_mult if self.ninf == 2 else 1.0


WidthScales = dict[str, WidthScale]


def base_shapes(base: RetroConfig, delta: RetroConfig) -> BaseShapes:
    """The shapes of base's parameters, null for dimensions that are the same in delta. Nothing is
    allocated.

    Raises:
        ConfigError: they differ in anything but widths, or a width is the same in both.
    """
    _check_pair(base, delta)
    first, second = _shapes(meta_model(base)), _shapes(meta_model(delta))
    return {
        name: [a if a != b else None for a, b in zip(shape, second[name], strict=True)]
        for name, shape in first.items()
    }


def meta_model(config: RetroConfig) -> Retro:
    """A model without memory for its parameters."""
    with torch.device("meta"):
        return Retro(config)


def _check_pair(base: RetroConfig, delta: RetroConfig) -> None:
    found, other = asdict(base), asdict(delta)
    differing = {k: (found[k], other[k]) for k in found if found[k] != other[k]}
    wrong = {k: values for k, values in differing.items() if k not in _WIDTHS}
    if wrong:
        raise ConfigError(
            f"base and delta differ in {wrong} (base, delta); expected the same model but for "
            f"its widths ({', '.join(sorted(_WIDTHS))})"
        )
    for name, a, b in zip(
        ("hidden_size", "ffn_hidden_size", "num_attention_heads * head width", "query groups"),
        _sizes(base),
        _sizes(delta),
        strict=True,
    ):
        if a == b:
            raise ConfigError(
                f"{name} is {a} in base and in delta; expected another size in delta, or it would "
                "count as a dimension that does not grow with width"
            )


def _sizes(config: RetroConfig) -> tuple[int, int, int, int]:
    shape = config.decoder_shape
    return shape.hidden_size, shape.ffn_hidden_size, shape.query_width, shape.group_width


def _pattern(name: str) -> str:
    return re.sub(r"layers\.\d+\.", "layers.*.", name)


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {_pattern(name): list(p.shape) for name, p in model.named_parameters()}


def to_yaml(shapes: BaseShapes) -> str:
    return yaml.safe_dump(shapes, default_flow_style=None, sort_keys=False)


def read_shape_file(url: str) -> BaseShapes:
    """The base shapes in a file on any fsspec URL.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: it is no shape file.
    """
    filesystem, path = filesystem_of(url)
    if not filesystem.isfile(path):
        raise FileNotFoundError(f"{url}: no shape file; jobs.mup_shapes writes one")
    found = yaml.safe_load(read_bytes(url))
    rows = found.values() if isinstance(found, dict) else [None]
    if not all(
        isinstance(row, list) and all(size is None or isinstance(size, int) for size in row)
        for row in rows
    ):
        raise ConfigError(f"{url}: expected a map of parameter names to lists of sizes or null")
    return found


def width_scales(model: nn.Module, shapes: BaseShapes) -> WidthScales:
    """The scale of each parameter of a model, which may be on the meta device.

    Raises:
        ConfigError: the shape file is for other parameters, or for another number of dimensions.
    """
    scales = {}
    for name, parameter in model.named_parameters():
        base = shapes.get(_pattern(name))
        if base is None or len(base) != parameter.ndim:
            raise ConfigError(
                f"the shape file has {base} for {name}, expected {parameter.ndim} dimensions as "
                f"in {list(parameter.shape)}; make it from base and delta configurations of "
                "this kind of model"
            )
        grown = [size / known for size, known in zip(parameter.shape, base, strict=True) if known]
        scales[name] = WidthScale(len(grown), grown[-1] if grown else 1.0)
    return scales


def with_mup(config: RetroConfig, shapes: BaseShapes) -> RetroConfig:
    """The same model under muP.

    Raises:
        ConfigError: the shape file is for another kind of model.
    """
    embedding = width_scales(meta_model(config), shapes)["word_embeddings.weight"]
    return replace(config, output_width_mult=embedding.width_mult)
