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
from torch import nn

from model.config import ConfigError, RetroConfig
from model.mup import WidthScale, WidthScales
from model.retro import Retro

_RESIDUAL = (".dense.weight", ".dense_4h_to_h.weight")
_MUP_LAYERS = 12
_SHARPNESS, _COPY_GAIN = 2.0, 3.0


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
    depth = 2 * layers if name.endswith(_RESIDUAL) else 1
    return config.init_method_std / sqrt(depth) / sqrt(width)


def start_retrieval_from_decoder(model: Retro) -> None:
    """Weights from which retrieval parts learn quickly on a frozen decoder: a pointer that copies.

    * The encoder starts as the identity: its layers write nothing into their residual streams yet,
      so an encoded neighbor token is its normalised embedding.
    * Queries, keys and values of chunked cross-attention start as identities, queries and keys only
      on the entries of a head that rotary positions leave alone (there are some if heads are wider
      than 32). A decoder state resembles the embeddings of the tokens it predicts, so a query finds
      neighbor tokens that are likely to come next.
    * The output projection starts as a multiple of the identity: what was found is written in the
      direction of its own embedding, which raises its logit.
    * The norm that replaces post_attention_layernorm starts as a copy of it, so that the MLPs see
      what they were trained on.

    Raises:
        ConfigError: the encoder has another width than the decoder.
    """
    config = model.config
    assert model.encoder is not None
    if config.enc_width_ratio != 1:
        raise ConfigError(
            f"enc_width_ratio is {config.enc_width_ratio}; on a frozen decoder retrieval starts by "
            "copying embeddings, which needs an encoder of the decoder's width (1)"
        )
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            if name.endswith(_RESIDUAL):
                parameter.zero_()
        for layer in config.dec_cross_attention:
            halves = model.decoder_layers[layer]
            half = halves.feed_forward_half
            assert half.cross_attention is not None
            _copy_pointer(half.cross_attention, config)
            trained = halves.attention_half.post_attention_layernorm.state_dict()
            half.post_inter_attention_layernorm.load_state_dict(trained)


def _copy_pointer(attention: nn.Module, config: RetroConfig) -> None:
    """Weights of a chunked cross-attention that copies what its query resembles; all heads together
    see every entry."""
    heads, width, d = config.num_attention_heads, config.head_dim, config.hidden_size
    groups = config.decoder_shape.num_query_groups
    turned = config.rotary_dim if width > config.rotary_dim else 0
    parameters = dict(attention.named_parameters())
    query = parameters["query.weight"].view(heads, width, d)
    key, value = parameters["key_value.weight"].view(groups, 2, width, d).unbind(1)
    dense = parameters["dense.weight"].view(d, heads, width)
    for part in (query[:, turned:], key[:, turned:], value, dense):
        part.zero_()
    content = torch.arange(groups * (width - turned)).view(groups, -1) % d
    copied = torch.arange(groups * width).view(groups, -1) % d
    for head in range(heads):
        group = head * groups // heads
        rows, places = torch.arange(turned, width), torch.arange(width)
        query[head, rows, content[group]] = _SHARPNESS
        key[group, rows, content[group]] = 1.0
        value[group, places, copied[group]] = 1.0
        dense[copied[group], head, places] = _COPY_GAIN * d / (heads * width)
