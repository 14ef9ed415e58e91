"""SentencePiece models: the file `tokenizer.model` of many language models."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from etl.huggingface_tokenizer import encoded_at, plain_piece
from etl.tokenizer import PAD_TOKEN, Encoded, TextTokenizer, TokenizerError


class SentencePieceTokenizer(TextTokenizer):
    """A TextTokenizer. The pad id is the model's own, or one after its last.

    Raises:
        TokenizerError: not a SentencePiece model, or without an end-of-document token.
    """

    def __init__(self, model: bytes, eod_token: str | None = None) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise TokenizerError(f"expected a SentencePiece model, found {error}") from None
        pieces = self._processor.get_piece_size()
        self.has_added_pad = self._processor.pad_id() < 0
        self.pad_id = pieces if self.has_added_pad else self._processor.pad_id()
        self.vocab_size = pieces + self.has_added_pad
        self.eod_id = self._end(eod_token)
        self.eod_token: str = self._processor.id_to_piece(self.eod_id)

    def _end(self, eod_token: str | None) -> int:
        found = self._processor.eos_id()
        if eod_token is not None:
            found = self._processor.piece_to_id(eod_token)
            found = -1 if found == self._processor.unk_id() else found
        if found < 0:
            raise TokenizerError(
                f"the tokenizer has no end-of-document token {eod_token or '(end of sentence)'!r}; "
                "name its own with eod_token"
            )
        return found

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._model + self.eod_token.encode()).hexdigest()[:32]

    def to_bytes(self) -> bytes:
        return self._model

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        found = []
        for text in texts:
            pieces = self._processor.encode(text, return_type="proto").pieces
            found.append(encoded_at(text, [p.id for p in pieces], [p.end for p in pieces]))
        return found

    def decode_batch(self, token_ids: NDArray[np.integer[Any]]) -> list[str]:
        return [
            self._processor.decode([i for i in row if not self._is_special(i)])
            for row in token_ids.tolist()
        ]

    def _is_special(self, i: int) -> bool:
        return i >= self._processor.get_piece_size() or self._processor.is_control(i)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        pieces = [self._piece(i) for i in range(self.vocab_size)]
        return [b"" if self._is_special(i) else plain_piece(p) for i, p in enumerate(pieces)]

    def _piece(self, i: int) -> str:
        inside = i < self._processor.get_piece_size()
        return self._processor.id_to_piece(i) if inside else PAD_TOKEN
