"""Initial weights: each parameter from a generator of its own, seeded by (seed, name).

So a weight does not depend on which other parameters exist or on how the model is sharded; run it
before `fully_shard`.

    embedding, query/key/value, query, key_value, dense_h_to_4h   normal(0, init_method_std)
    dense, dense_4h_to_h (they write into the residual stream)    the same / sqrt(2 * layers)
    layer norms                                                   weight 1, bias 0
    all biases                                                    0
"""

import hashlib
from math import sqrt

import torch
from torch import nn

from model.config import RetroConfig
from model.retro import Retro

_RESIDUAL = (".dense.weight", ".dense_4h_to_h.weight")


def initialize(model: Retro, seed: int) -> None:
    """Fills every parameter in place."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("bias"):
                parameter.zero_()
            elif "layernorm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(
                    0.0, standard_deviation(name, model.config), generator=generator_for(seed, name)
                )


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose numbers depend on seed and name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def standard_deviation(name: str, config: RetroConfig) -> float:
    layers = config.enc_num_layers if name.startswith("encoder.") else config.dec_num_layers
    return (
        config.init_method_std / sqrt(2 * layers)
        if name.endswith(_RESIDUAL)
        else config.init_method_std
    )


def start_retrieval_from_decoder(model: nn.Module) -> None:
    """Before retrieval parts are added to a trained decoder: the norm that replaces
    post_attention_layernorm in layers with chunked cross-attention starts as a copy of it, so that
    the MLPs first see what they were trained on."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.startswith("layers.") and ".post_inter_attention_layernorm." in name:
                trained = name.replace(
                    "feed_forward_half.post_inter_attention", "attention_half.post_attention"
                )
                parameter.copy_(parameters[trained])
