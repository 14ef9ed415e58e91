"""RETRO (arXiv 2112.04426, NeMo's variant) and its plain decoder: one class, retrieval on or off.

The decoder runs to the attention half of its first layer with chunked cross-attention; the
retrieval encoder reads the neighbors in the light of the states there; the decoder goes on and
attends to what the encoder made of them. Token t may see the neighbors of chunk u iff t >= (u + 1)
* chunk_size - 1. Retrieval off means: chunked cross-attention is skipped.

The model knows nothing of devices, meshes or files. Shape letters as in `model/attention.py`; V
vocabulary.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from model.attention import Context, Mask, windows
from model.block_attention import block_mask
from model.config import RetroConfig
from model.head import Head
from model.layers import DecoderLayer, EncoderLayer, norm
from model.rotary import Table, rotary_table


class NeighborEncoder(nn.Module):
    """Encodes each neighbor bidirectionally, attending to the decoder's states of the chunk it was
    retrieved for."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            EncoderLayer(config, layer in config.enc_cross_attention)
            for layer in range(config.enc_num_layers)
        )
        width = config.encoder_shape.hidden_size
        self.projection = None
        if width != config.hidden_size:
            self.projection = nn.Linear(config.hidden_size, width, bias=config.bias)
        self.final_layernorm = norm(config, width)

    def forward(
        self, x_NKRD: Tensor, mask_NKR: Tensor, chunk_NMD: Tensor, chunk_mask_NM: Tensor
    ) -> Tensor:
        """[N, K, R, width of the encoder] from embedded neighbors, the states of their chunks (both
        of the decoder's width), and which tokens of both are no pads. Pads are no keys; what they
        become as queries is not read by anything."""
        table = self._table(x_NKRD.shape[2], x_NKRD.device)
        dtype = x_NKRD.dtype
        self_mask = Mask.of(mask_NKR.flatten(0, 1)[:, None], dtype)
        context = Context(
            states_NTD=chunk_NMD,
            mask=Mask.of(chunk_mask_NM[:, None], dtype),
            query_table=tuple(part.repeat(x_NKRD.shape[1], 1) for part in table),  # type: ignore[arg-type]
            key_table=self._table(chunk_NMD.shape[1], x_NKRD.device),
        )
        if self.projection is not None:
            x_NKRD = self.projection(x_NKRD)
        neighbors = x_NKRD.shape[1]
        x_NQD = x_NKRD.flatten(1, 2)
        for layer in self.layers:
            x_NQD = layer(x_NQD, neighbors, table, self_mask, context)
        return self.final_layernorm(x_NQD).unflatten(1, (neighbors, -1))

    def _table(self, length: int, device: torch.device) -> Table:
        return rotary_table(
            torch.arange(length, device=device), self.config.rotary_dim, self.config.rope_theta
        )


class Retro(nn.Module):
    """NeMo's function or that of a modern decoder, as configured; pre-norm, rotary positions."""

    def __init__(self, config: RetroConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer in config.dec_cross_attention)
            for layer in range(config.dec_num_layers)
        )
        self.encoder = NeighborEncoder(config) if config.has_retrieval else None
        self.final_layernorm = norm(config, config.hidden_size)
        self.head = Head(config)

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        return cast(list[DecoderLayer], list(self.layers))

    def forward(
        self,
        tokens_BL: Tensor,
        tokens_mask_BL: Tensor,
        neighbors_BCKR: Tensor | None = None,
        neighbors_mask_BCKR: Tensor | None = None,
        labels_BL: Tensor | None = None,
        loss_mask_BL: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, L, V] of the next token; with labels, the float32 losses [n] of the n labels
        in loss_mask_BL.

        Args:
            tokens_BL: Token ids; L need not be a multiple of chunk_size.
            tokens_mask_BL: False on pads.
            neighbors_BCKR: Token ids of K neighbors of each of the C = L // chunk_size whole
                chunks, R = 2 chunk_size; None turns retrieval off.
            neighbors_mask_BCKR: False on pads and on missing neighbors.
            labels_BL: Next tokens; the head then runs only where loss_mask_BL is True.
            loss_mask_BL: Which labels count.

        Raises:
            ValueError: neighbors for a plain decoder, or of another shape than the chunks need.
        """
        if neighbors_BCKR is not None:
            self._check_neighbors(tokens_BL, neighbors_BCKR, neighbors_mask_BCKR)
        x_BLD, embedded_BCKRD = self._embed(tokens_BL, neighbors_BCKR)
        table = self.rotary_table(torch.arange(tokens_BL.shape[1], device=tokens_BL.device))
        segments_BL = document_segments(tokens_BL, self.config.eod_id)
        mask = self._decoder_mask(segments_BL, tokens_mask_BL, x_BLD.dtype)
        context = None
        for i, layer in enumerate(self.decoder_layers):
            if i == self.config.split_layer:
                x_BLD, y_BLD = layer.attention_half(x_BLD, table, mask)
                if embedded_BCKRD is not None and neighbors_mask_BCKR is not None:
                    context = self._neighbor_context(
                        y_BLD, tokens_mask_BL, segments_BL, embedded_BCKRD, neighbors_mask_BCKR
                    )
                x_BLD = layer.feed_forward_half(x_BLD, y_BLD, context)
            else:
                x_BLD = layer(x_BLD, table, mask, context)
        hidden_BLD = self.final_layernorm(x_BLD)
        embedding_VD = self.word_embeddings.weight
        if labels_BL is None or loss_mask_BL is None:
            return self.head(hidden_BLD, embedding_VD)
        return self.head.losses(hidden_BLD[loss_mask_BL], embedding_VD, labels_BL[loss_mask_BL])

    def _embed(
        self, tokens_BL: Tensor, neighbors_BCKR: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, L, D] and [B, C, K, R, D], of one look-up."""
        given = [tokens_BL] if neighbors_BCKR is None else [tokens_BL, neighbors_BCKR]
        flat = self.word_embeddings(torch.cat([ids.flatten() for ids in given]))
        flat = F.dropout(flat, self.config.hidden_dropout, self.training)
        parts = flat.split([ids.numel() for ids in given])
        tokens, *neighbors = (
            x.view(*i.shape, x.shape[-1]) for x, i in zip(parts, given, strict=True)
        )
        return tokens, neighbors[0] if neighbors else None

    def _decoder_mask(
        self, segments_BL: Tensor, tokens_mask_BL: Tensor, dtype: torch.dtype
    ) -> Mask | BlockMask:
        """Of causal self-attention; by blocks on CUDA, where attention_dropout allows it. On a CPU,
        samples of one document without pads need no table of pairs."""
        if not self.config.reset_attention_mask:
            segments_BL = torch.zeros_like(segments_BL)
        if segments_BL.is_cuda and not (self.training and self.config.attention_dropout):
            return block_mask(segments_BL, tokens_mask_BL)
        if not tokens_mask_BL.is_cuda and tokens_mask_BL.all() and not segments_BL.any():
            return Mask(is_causal=True)
        return Mask.of(causal_mask(segments_BL, tokens_mask_BL), dtype)

    def _check_neighbors(
        self, tokens_BL: Tensor, neighbors_BCKR: Tensor, neighbors_mask_BCKR: Tensor | None
    ) -> None:
        batch, length = tokens_BL.shape
        m = self.config.chunk_size
        if self.encoder is None or neighbors_mask_BCKR is None:
            raise ValueError(
                "neighbors were given, but this is a plain decoder or their mask is missing"
            )
        if neighbors_BCKR.shape[:2] != (batch, length // m) or neighbors_BCKR.shape[3] != 2 * m:
            raise ValueError(
                f"neighbors are {list(neighbors_BCKR.shape)}; {batch} sequences of {length} tokens "
                f"in chunks of {m} need [{batch}, {length // m}, K, {2 * m}]"
            )

    def _neighbor_context(
        self,
        y_BLD: Tensor,
        tokens_mask_BL: Tensor,
        segments_BL: Tensor,
        neighbors_BCKRD: Tensor,
        neighbors_mask_BCKR: Tensor,
    ) -> Context:
        """Runs the encoder on the neighbors of all whole chunks; what chunked cross-attention
        attends to."""
        m = self.config.chunk_size
        chunks = tokens_mask_BL.shape[1] // m
        assert self.encoder is not None
        mask_NKR = neighbors_mask_BCKR.flatten(0, 1)
        encoded_NKRD = self.encoder(
            neighbors_BCKRD.flatten(0, 1),
            mask_NKR,
            y_BLD[:, : chunks * m].unflatten(1, (chunks, m)).flatten(0, 1),
            tokens_mask_BL[:, : chunks * m].unflatten(1, (chunks, m)).flatten(0, 1),
        )
        query_mask_NM = windows(tokens_mask_BL, m).flatten(0, 1)
        if self.config.reset_cross_attention:
            chunk_segment_NM = segments_BL[:, : chunks * m : m].reshape(-1, 1)
            query_mask_NM = query_mask_NM & (
                windows(segments_BL, m).flatten(0, 1) == chunk_segment_NM
            )
        return Context(
            states_NTD=encoded_NKRD.flatten(1, 2),
            mask=Mask.of(query_mask_NM[:, :, None] & mask_NKR.flatten(1)[:, None, :], y_BLD.dtype),
            query_table=self.rotary_table(torch.arange(m, device=y_BLD.device)),
            key_table=self.neighbor_table(mask_NKR.shape[1], y_BLD.device),
        )

    def neighbor_table(self, neighbors: int, device: torch.device) -> Table:
        """For the K * R keys of chunked cross-attention: the same positions for each neighbor, so
        that their order does not matter."""
        m = self.config.chunk_size
        first = -(m - 1) if self.config.version == 2 else 0
        return self.rotary_table((torch.arange(2 * m, device=device) + first).repeat(neighbors))

    def rotary_table(self, positions: Tensor) -> Table:
        """Of the decoder's positions [L]."""
        return rotary_table(positions, self.config.rotary_dim, self.config.rope_theta)


def document_segments(tokens_BL: Tensor, eod_id: int) -> Tensor:
    """[B, L] how many end-of-document tokens stand before each position; an end-of-document belongs
    to its document."""
    ends = (tokens_BL == eod_id).long()
    return ends.cumsum(dim=1) - ends


def causal_mask(segments_BL: Tensor, tokens_mask_BL: Tensor) -> Tensor:
    """[B, L, L] query may see key: not later, same document, neither a pad."""
    length = segments_BL.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments_BL.device).tril()
    same = segments_BL[:, :, None] == segments_BL[:, None, :]
    return causal & same & tokens_mask_BL[:, :, None] & tokens_mask_BL[:, None, :]


def is_retrieval_parameter(name: str) -> bool:
    """Whether a parameter exists only for retrieval: the encoder and chunked cross-attention with
    its norm."""
    return (
        name.startswith("encoder.")
        or ".cross_attention." in name
        or ".post_inter_attention_layernorm." in name
    )
