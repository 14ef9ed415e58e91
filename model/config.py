"""The model's configuration: data only, NeMo's words where NeMo has one."""

from dataclasses import dataclass
from typing import Literal


class ConfigError(ValueError):
    """A configuration that describes no model."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a RETRO model, or of a plain decoder when dec_cross_attention is empty.

    Attributes:
        hidden_size: Width of decoder and encoder.
        ffn_hidden_size: Width inside the MLPs.
        num_attention_heads: Heads of every attention.
        kv_channels: Width of a head; by default hidden_size / num_attention_heads.
        dec_num_layers: Decoder layers.
        dec_cross_attention: Decoder layers (from 0) with chunked cross-attention; the first of them
            is split around the retrieval encoder. Empty: no retrieval, a plain decoder.
        enc_num_layers: Layers of the retrieval encoder.
        enc_cross_attention: Encoder layers that attend to the decoder's states of the chunk.
        version: Rotary positions of neighbor tokens in chunked cross-attention: 2 starts at
            -(chunk_size - 1), so that a continuation lines up with the queries; 1 starts at 0.
        layernorm_epsilon: Of all layer norms.
        rotary_base: Base of the rotary angles; they turn the first 32 entries of a head at most.
        init_method_std: Standard deviation of initial weights.
        reset_cross_attention: A token does not see neighbors of a chunk of another document (NeMo:
            it does).
    """

    hidden_size: int = 768
    ffn_hidden_size: int = 3072
    num_attention_heads: int = 12
    kv_channels: int | None = None
    dec_num_layers: int = 12
    dec_cross_attention: tuple[int, ...] = (5, 8, 11)
    enc_num_layers: int = 2
    enc_cross_attention: tuple[int, ...] = (0,)
    version: Literal[1, 2] = 2
    layernorm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    init_method_std: float = 0.02
    reset_cross_attention: bool = True


@dataclass(frozen=True)
class RetroConfig(ModelConfig):
    """A ModelConfig together with what the dataset determines. Checked on construction.

    Raises:
        ConfigError: layers out of range, or widths that do not divide.
    """

    vocab_size: int = 0
    eod_id: int = 0
    chunk_size: int = 64

    def __post_init__(self) -> None:
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; "
                "change one of them or set kv_channels"
            )
        if self.rotary_dim % 2:
            raise ConfigError(
                f"heads are {self.head_dim} wide; rotary positions need an even width"
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
        return min(self.head_dim, 32)


def _check_layers(name: str, layers: tuple[int, ...], count: int) -> None:
    if len(set(layers)) != len(layers) or any(not 0 <= layer < count for layer in layers):
        raise ConfigError(
            f"{name} is {list(layers)}; expected different layers among 0..{count - 1}"
        )
