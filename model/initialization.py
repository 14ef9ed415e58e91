"""Initial weights: each parameter from a generator of its own, seeded by (seed, name).

So a weight does not depend on which other parameters exist or on how the model is sharded; run it
before `fully_shard`.

    embedding, query/key/value, query, key_value, dense_h_to_4h   normal(0, init_method_std)
    dense, dense_4h_to_h (they write into the residual stream)    the same / sqrt(2 * layers)
    norms                                                         weight 1
    all biases, gates                                             0

Under muP (`model/mup.py`) matrices are scaled by their width, and what writes into the residual
stream is divided by sqrt(24) whatever the depth, as in NeMo.
"""

import hashlib
from math import sqrt

import torch

from model.config import RetroConfig
from model.mup import WidthScale, WidthScales
from model.retro import Retro

RESIDUAL = (".dense.weight", ".dense_4h_to_h.weight")
"""Ends of the names of matrices that write into a residual stream."""
_MUP_LAYERS = 12


def initialize(model: Retro, seed: int, scales: WidthScales | None = None) -> None:
    """Fills every parameter in place; under muP with the width scales of its parameters."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith(("bias", "gate")):
                parameter.zero_()
            elif "layernorm" in name:
                parameter.fill_(1.0)
            else:
                scale = None if scales is None else scales[name]
                std = standard_deviation(name, model.config, scale)
                parameter.normal_(0.0, std, generator=generator_for(seed, name))


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose numbers depend on seed and name alone."""
    return torch.Generator().manual_seed(generator_seed(seed, name))


def generator_seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def standard_deviation(name: str, config: RetroConfig, scale: WidthScale | None = None) -> float:
    """Of a weight's initial values; with a scale, under muP."""
    layers = config.enc_num_layers if name.startswith("encoder.") else config.dec_num_layers
    if scale is not None:
        layers = _MUP_LAYERS
    width = 1.0 if scale is None else scale.matrix_mult
    depth = 2 * layers if name.endswith(RESIDUAL) else 1
    return config.init_method_std / sqrt(depth) / sqrt(width)
