"""Weights from which retrieval parts learn within hundreds of steps: pointers that copy.

From random weights nothing in natural text tells a copied token from noise for a long time:
attention over the 2 K chunk_size tokens of the neighbors dilutes it a hundredfold.
"""

from dataclasses import dataclass
from math import sqrt
from typing import cast

import torch
from torch import Tensor, nn

from model.attention import SelfAttention
from model.config import ConfigError, RetroConfig
from model.initialization import RESIDUAL
from model.layers import EncoderLayer
from model.retro import NeighborEncoder, Retro

_SHARPNESS, _GAIN = 2.0, 3.0
# By how much the score of a match, and of the token before, surpasses others'.
_MATCH, _BEFORE = 8.5, 8.5
_GAIN_OF_EMBEDDINGS = 10.0
# Entries of a head that turn by less, or by more, radians a position.
_SLOW, _FAST = 0.01, 0.05


@dataclass(frozen=True)
class _Pointer:
    """A chunked cross-attention whose queries, keys and values are identities.

    Attributes:
        rows: Entries of a head by which queries and keys are compared.
        sharpness: Factor of the queries.
        gain: Factor of what is written.
        moved: Keys read the entries of encoded neighbors that stand so much further on.
    """

    rows: Tensor
    sharpness: float
    gain: float
    moved: int = 0


def start_retrieval_from_decoder(model: Retro) -> None:
    """On a trained decoder that stays frozen.

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
    config, encoder = _checked(model)
    turned = config.rotary_dim if config.head_dim > config.rotary_dim else 0
    pointer = _Pointer(torch.arange(turned, config.head_dim), _SHARPNESS, _GAIN)
    with torch.no_grad():
        _silence(encoder)
        for layer in config.dec_cross_attention:
            halves = model.decoder_layers[layer]
            trained = halves.attention_half.post_attention_layernorm.state_dict()
            halves.feed_forward_half.post_inter_attention_layernorm.load_state_dict(trained)
            _point(halves.feed_forward_half.cross_attention, config, pointer)


def start_copying(model: Retro) -> None:
    """In an untrained model: an induction head (arXiv 2209.11895) over neighbors, which finds what
    followed the current token there.

    * The encoder's first layer adds to each token's embedding that of the token before it, moved by
      half the width. It finds it by queries and keys that are constant (their biases) and whose
      rotary angles agree at a distance of one.
    * No other layer, of encoder or decoder, writes anything yet. So a decoder state is the current
      token's embedding; at usual weights it would drown in what wide layers add to it.
    * Queries of chunked cross-attention read the state, keys the embedding of the neighbor's token
      before, values that of the token itself; compared are entries that rotary positions turn by
      little.
    * What was found is written in the direction of its own embedding, which raises its logit.

    A plain decoder is silenced only: the one to compare such a model with.

    Raises:
        ConfigError: the encoder has another width than the decoder, there are no biases, there is a
            gate, which starts closed, or rotary positions turn all entries of a head.
    """
    if not model.config.has_retrieval:
        return _silence(model)
    config, encoder = _checked(model)
    if not config.bias or config.cross_attention_gate:
        raise ConfigError(
            f"bias is {config.bias} and cross_attention_gate {config.cross_attention_gate}; a model"
            " that starts by copying needs biases, by which its encoder finds the token before, and"
            " no gate, which would start closed"
        )
    size = float(model.word_embeddings.weight.detach().std())
    rows = torch.arange(config.head_dim)[_angles(config) <= _SLOW]
    if not len(rows):
        raise ConfigError(
            f"rotary_percentage {config.rotary_percentage} and rope_theta {config.rope_theta} turn "
            f"all {config.head_dim} entries of a head by more than {_SLOW} a position; a model that"
            " starts by copying compares tokens by the others"
        )
    sharpness = _MATCH * sqrt(2) / (config.attention_scale * len(rows))
    pointer = _Pointer(rows, sharpness, _GAIN_OF_EMBEDDINGS * size, config.hidden_size // 2)
    with torch.no_grad():
        _silence(model)
        first = cast(EncoderLayer, encoder.layers[0])
        _look_back(first.attention_half.self_attention, config, size)
        for layer in config.dec_cross_attention:
            half = model.decoder_layers[layer].feed_forward_half
            _point(half.cross_attention, config, pointer)


def _checked(model: Retro) -> tuple[RetroConfig, NeighborEncoder]:
    assert model.encoder is not None
    if model.config.enc_width_ratio != 1:
        raise ConfigError(
            f"enc_width_ratio is {model.config.enc_width_ratio}; retrieval that starts by copying "
            "embeddings needs an encoder of the decoder's width (1)"
        )
    return model.config, model.encoder


@torch.no_grad()
def _silence(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if name.endswith(RESIDUAL):
            parameter.zero_()


def _angles(config: RetroConfig) -> Tensor:
    """[head_dim] by how much a position turns each entry of a head."""
    half = config.rotary_dim // 2
    turned = config.rope_theta ** (-torch.arange(half) / half)
    return torch.cat([turned, turned, torch.zeros(config.head_dim - 2 * half)])


def _stretches(groups: int, count: int, size: int) -> Tensor:
    """[groups, count] which of `size` entries each group reads: one stretch after the other, from
    the first again after the last."""
    return torch.arange(groups * count).view(groups, -1) % size


def _look_back(attention: SelfAttention, config: RetroConfig, size: float) -> None:
    """Each token reads the one before it and writes it, of the given size, moved by half the
    width."""
    heads, width, d = config.num_attention_heads, config.head_dim, config.hidden_size
    groups, half = config.decoder_shape.num_query_groups, config.rotary_dim // 2
    parts = (groups, heads // groups + 2, width)
    weight = attention.query_key_value.weight.view(*parts, d)
    bias = attention.query_key_value.bias.view(parts)
    dense = attention.dense.weight.view(d, heads, width)
    fast = _angles(config)[:half]
    fast = fast[fast > _FAST]
    # Scores at a distance of two fall behind those at one by _BEFORE.
    strength = sqrt(_BEFORE / (config.attention_scale * float((1 - fast.cos()).sum())))
    weight.zero_()
    bias[:, :-2, : len(fast)] = strength
    bias[:, -2, : len(fast)] = strength * fast.cos()
    bias[:, -2, half : half + len(fast)] = strength * fast.sin()
    places, read = torch.arange(width), _stretches(groups, width, d)
    for head in range(heads):
        group = head * groups // heads
        weight[group, -1, places, read[group]] = 1.0
        dense[(read[group] + d // 2) % d, head, places] = size * d / (heads * width)


def _point(attention: nn.Module | None, config: RetroConfig, pointer: _Pointer) -> None:
    """Weights of a chunked cross-attention that copies what its query resembles; all heads together
    see every entry."""
    assert attention is not None
    heads, width, d = config.num_attention_heads, config.head_dim, config.hidden_size
    groups, rows = config.decoder_shape.num_query_groups, pointer.rows
    parameters = dict(attention.named_parameters())
    query = parameters["query.weight"].view(heads, width, d)
    key, value = parameters["key_value.weight"].view(groups, 2, width, d).unbind(1)
    dense = parameters["dense.weight"].view(d, heads, width)
    query[:, rows], key[:, rows] = 0.0, 0.0
    value.zero_()
    dense.zero_()
    content = _stretches(groups, len(rows), d)
    copied = _stretches(groups, width, d)
    places = torch.arange(width)
    for head in range(heads):
        group = head * groups // heads
        query[head, rows, content[group]] = pointer.sharpness
        key[group, rows, (content[group] + pointer.moved) % d] = 1.0
        value[group, places, copied[group]] = 1.0
        dense[copied[group], head, places] = pointer.gain * d / (heads * width)
