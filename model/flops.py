"""Floating-point operations of a training step, in closed form.

Of matrix products only (2 m n k each), attention over all pairs included, as
`torch.utils.flop_counter.FlopCounterMode` counts them; a backward pass takes twice a forward pass.
The rule of 6 operations a parameter and token is far off for RETRO: the encoder's weights act on
2 K tokens for each token of the decoder, most of the embedding on none.
"""

from model.config import RetroConfig, StackShape


def forward_flops(config: RetroConfig, length: int, neighbors: int) -> dict[str, int]:
    """Operations of a forward pass over one sample of `length` tokens with that many neighbors a
    chunk (0: retrieval off), by part."""
    chunks = length // config.chunk_size if config.has_retrieval and neighbors else 0
    decoder, encoder = config.decoder_shape, config.encoder_shape
    window = chunks * config.chunk_size
    shown = window * 2 * neighbors
    layers = config.dec_num_layers
    parts = {
        "decoder self-attention": layers * _self_attention(decoder, length, length),
        "decoder MLPs": layers * _mlp(config, decoder, length),
        "chunked cross-attention": 0,
        "encoder self-attention": 0,
        "encoder cross-attention": 0,
        "encoder MLPs": 0,
        "logits": _linear(length, config.hidden_size, config.padded_vocab_size),
    }
    if not chunks:
        return parts
    depth, seen = config.enc_num_layers, 2 * config.chunk_size
    look_up = _cross_attention(decoder, encoder, (window, shown), shown // chunks)
    look_up += _output(decoder, length)
    read = _cross_attention(encoder, decoder, (shown, window), config.chunk_size)
    read += _output(encoder, shown)
    projection = 0
    if encoder.hidden_size != decoder.hidden_size:
        projection = _linear(shown, decoder.hidden_size, encoder.hidden_size)
    return parts | {
        "chunked cross-attention": len(config.dec_cross_attention) * look_up,
        "encoder self-attention": depth * _self_attention(encoder, shown, seen) + projection,
        "encoder cross-attention": len(config.enc_cross_attention) * read,
        "encoder MLPs": depth * _mlp(config, encoder, shown),
    }


def training_flops(config: RetroConfig, length: int, neighbors: int) -> int:
    """Operations of a forward and a backward pass over one sample."""
    return 3 * sum(forward_flops(config, length, neighbors).values())


def describe(config: RetroConfig, length: int, neighbors: int) -> str:
    """The training operations of a token, and the share of each part in them."""
    parts = forward_flops(config, length, neighbors)
    total = sum(parts.values())
    shares = ", ".join(f"{name} {100 * n / total:.1f}%" for name, n in parts.items() if n)
    return f"{3 * total / length / 1e9:.3f} GFLOP a token: {shares}"


def _linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def _output(shape: StackShape, tokens: int) -> int:
    return _linear(tokens, shape.query_width, shape.hidden_size)


def _pairs(shape: StackShape, tokens: int, keys: int) -> int:
    """Scores and sums of values, for queries that see `keys` each."""
    return 4 * tokens * keys * shape.query_width


def _self_attention(shape: StackShape, tokens: int, keys: int) -> int:
    return (
        _linear(tokens, shape.hidden_size, shape.query_width + 2 * shape.group_width)
        + _pairs(shape, tokens, keys)
        + _output(shape, tokens)
    )


def _cross_attention(
    shape: StackShape, other: StackShape, tokens: tuple[int, int], keys: int
) -> int:
    """Without the output projection; `tokens` are those of the queries and of the context."""
    queries, context = tokens
    return (
        _linear(queries, shape.hidden_size, shape.query_width)
        + _linear(context, other.hidden_size, 2 * shape.group_width)
        + _pairs(shape, queries, keys)
    )


def _mlp(config: RetroConfig, shape: StackShape, tokens: int) -> int:
    first = shape.ffn_hidden_size * (2 if config.activation == "swiglu" else 1)
    return _linear(tokens, shape.hidden_size, first) + _linear(
        tokens, shape.ffn_hidden_size, shape.hidden_size
    )
