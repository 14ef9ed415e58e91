"""The model's configuration: data only, NeMo's words where NeMo has one."""

from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

_BASE_HEAD = 64
_SCALED = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")


class ConfigError(ValueError):
    """A configuration that describes no model."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a RETRO model, or of a plain decoder when dec_cross_attention is empty.

    Attributes:
        hidden_size: Width of decoder and encoder.
        ffn_hidden_size: Width inside the MLPs.
        num_attention_heads: Heads of every attention.
        num_query_groups: Heads of keys and values, each shared by as many query heads
            (grouped-query attention); by default num_attention_heads.
        kv_channels: Width of a head; by default hidden_size / num_attention_heads.
        dec_num_layers: Decoder layers.
        dec_cross_attention: Decoder layers (from 0) with chunked cross-attention; the first of them
            is split around the retrieval encoder. Empty: no retrieval, a plain decoder.
        enc_num_layers: Layers of the retrieval encoder.
        enc_cross_attention: Encoder layers that attend to the decoder's states of the chunk.
        enc_width_ratio: Width of the encoder (hidden_size, ffn_hidden_size, heads) as a multiple
            of the decoder's.
        version: Rotary positions of neighbor tokens in chunked cross-attention: 2 starts at
            -(chunk_size - 1), so that a continuation lines up with the queries; 1 starts at 0.
        normalization: Of every norm.
        layernorm_epsilon: Of all norms.
        activation: gelu (its tanh form), or swiglu, whose first matrix is twice as high.
        bias: Whether linear layers and layer norms have biases.
        rotary_percentage: Share of a head's entries that rotary positions turn; by default the
            first 32 of them at most.
        rope_theta: Base of the rotary angles.
        hidden_dropout: Of embeddings and of what each part of a layer adds.
        attention_dropout: Of attention probabilities.
        share_embeddings_and_output_weights: One matrix for embedding and logits.
        tokens_head_bias: A learned bias on the logits.
        make_vocab_size_divisible_by: The matrices of embedding and logits have as many rows more as
            that takes; they are never predicted.
        cross_attention_gate: What chunked cross-attention adds is multiplied by tanh of a learned
            number that starts at 0: retrieval starts as a no-op.
        init_method_std: Standard deviation of initial weights.
        reset_attention_mask: A token does not see earlier documents of its sample.
        reset_cross_attention: A token does not see neighbors of a chunk of another document (NeMo:
            it does).
    """

    hidden_size: int = 768
    ffn_hidden_size: int = 3072
    num_attention_heads: int = 12
    num_query_groups: int | None = None
    kv_channels: int | None = None
    dec_num_layers: int = 12
    dec_cross_attention: tuple[int, ...] = (5, 8, 11)
    enc_num_layers: int = 2
    enc_cross_attention: tuple[int, ...] = (0,)
    enc_width_ratio: float = 1.0
    version: Literal[1, 2] = 2
    normalization: Literal["layernorm", "rmsnorm"] = "layernorm"
    layernorm_epsilon: float = 1e-5
    activation: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    rotary_percentage: float | None = None
    rope_theta: float = 10000.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    share_embeddings_and_output_weights: bool = True
    tokens_head_bias: bool = True
    make_vocab_size_divisible_by: int = 128
    cross_attention_gate: bool = False
    init_method_std: float = 0.02
    reset_attention_mask: bool = True
    reset_cross_attention: bool = True


@dataclass(frozen=True)
class StackShape:
    """Widths of the layers of the decoder or of the encoder."""

    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int

    @property
    def query_width(self) -> int:
        """Of the queries of all heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def group_width(self) -> int:
        """Of the keys, or of the values, of all groups together."""
        return self.num_query_groups * self.head_dim


@dataclass(frozen=True)
class RetroConfig(ModelConfig):
    """A ModelConfig together with what the dataset and a muP shape file determine. Checked on
    construction.

    Attributes:
        output_width_mult: muP (`model/mup.py`): the final states are divided by it, attention
            scores by head_dim / 8. None: standard parametrisation.

    Raises:
        ConfigError: layers out of range, or widths that do not divide.
    """

    vocab_size: int = 0
    eod_id: int = 0
    chunk_size: int = 64
    output_width_mult: float | None = None

    def __post_init__(self) -> None:
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; "
                "change one of them or set kv_channels"
            )
        self._check_widths()
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ConfigError(
                f"heads are {self.head_dim} wide, of which rotary positions turn {self.rotary_dim};"
                " expected an even number of entries above 0"
            )
        _check_layers("dec_cross_attention", self.dec_cross_attention, self.dec_num_layers)
        if self.has_retrieval:
            _check_layers("enc_cross_attention", self.enc_cross_attention, self.enc_num_layers)
            if self.enc_num_layers < 1:
                raise ConfigError(
                    f"enc_num_layers is {self.enc_num_layers}; retrieval needs at least one"
                )
        if self.vocab_size < 1 or not 0 <= self.eod_id < self.vocab_size or self.chunk_size < 1:
            raise ConfigError(
                f"vocab_size {self.vocab_size}, eod_id {self.eod_id}, chunk_size "
                f"{self.chunk_size}; expected "
                "0 <= eod_id < vocab_size and chunk_size >= 1"
            )

    def _check_widths(self) -> None:
        if self.num_attention_heads % (self.num_query_groups or 1):
            raise ConfigError(
                f"num_query_groups {self.num_query_groups} does not divide num_attention_heads "
                f"{self.num_attention_heads}"
            )
        for name in _SCALED:
            width = getattr(self.decoder_shape, name) * self.enc_width_ratio
            if self.has_retrieval and (width < 1 or width % 1):
                raise ConfigError(
                    f"enc_width_ratio {self.enc_width_ratio} gives the encoder a {name} of {width};"
                    " expected a whole number"
                )

    @property
    def decoder_shape(self) -> StackShape:
        groups = self.num_query_groups or self.num_attention_heads
        sizes = (self.hidden_size, self.ffn_hidden_size, self.num_attention_heads, groups)
        return StackShape(*sizes, self.head_dim)

    @property
    def encoder_shape(self) -> StackShape:
        decoder, ratio = self.decoder_shape, self.enc_width_ratio
        return replace(decoder, **{name: int(getattr(decoder, name) * ratio) for name in _SCALED})

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // multiple) * multiple

    @property
    def attention_scale(self) -> float:
        """What attention scores are multiplied by."""
        is_mup = self.output_width_mult is not None
        return sqrt(_BASE_HEAD) / self.head_dim if is_mup else 1 / sqrt(self.head_dim)

    @property
    def has_retrieval(self) -> bool:
        return bool(self.dec_cross_attention)

    @property
    def split_layer(self) -> int:
        """The decoder layer around which the encoder runs; dec_num_layers when there is no
        retrieval."""
        return min(self.dec_cross_attention, default=self.dec_num_layers)

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        if self.rotary_percentage is None:
            return min(self.head_dim, 32)
        return int(self.head_dim * self.rotary_percentage)


def _check_layers(name: str, layers: tuple[int, ...], count: int) -> None:
    if len(set(layers)) != len(layers) or any(not 0 <= layer < count for layer in layers):
        raise ConfigError(
            f"{name} is {list(layers)}; expected different layers among 0..{count - 1}"
        )
