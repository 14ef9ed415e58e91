"""Tokenizers of the `tokenizers` library: a tokenizer.json, or GPT-2's vocab.json and merges.txt.

Byte-level BPE, which most models use, is encoded by `etl/fast_bpe.py` where that gives equal ids.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from etl.fast_bpe import FastBPE, byte_of_character, is_byte_level
from etl.tokenizer import EOD_TOKENS, PAD_TOKEN, Encoded, TextTokenizer, TokenizerError

_OWN_PADS = (PAD_TOKEN, "<pad>", "[PAD]")


class HuggingFaceTokenizer(TextTokenizer):
    """A TextTokenizer. The pad token is its own (`<|pad|>`, `<pad>`, `[PAD]`) or is added.

    Raises:
        TokenizerError: no end-of-document token.
    """

    def __init__(self, tokenizer: Tokenizer, eod_token: str | None = None) -> None:
        wanted = EOD_TOKENS if eod_token is None else (eod_token,)
        known = [token for token in wanted if tokenizer.token_to_id(token) is not None]
        if not known:
            raise TokenizerError(
                f"the tokenizer has no end-of-document token {' or '.join(map(repr, wanted))}; "
                "name its own with eod_token"
            )
        pads = [t for t in _OWN_PADS if t != known[0] and tokenizer.token_to_id(t) is not None]
        self.has_added_pad = not pads
        if not pads:
            tokenizer.add_special_tokens([AddedToken(PAD_TOKEN, special=True, normalized=False)])
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.eod_token = known[0]
        self.pad_id = _id_of(tokenizer, pads[0] if pads else PAD_TOKEN)
        self.eod_id = _id_of(tokenizer, known[0])
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_json(cls, text: str, eod_token: str | None) -> "HuggingFaceTokenizer":
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(f"expected a Hugging Face tokenizer.json, found {error}") from None
        return cls(tokenizer, eod_token)

    @classmethod
    def from_gpt2_files(cls, folder: Path, eod_token: str | None) -> "HuggingFaceTokenizer":
        try:
            model = BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(
                f"vocab.json and merges.txt do not fit together: {error}"
            ) from None
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        ends = [t for t in EOD_TOKENS if tokenizer.token_to_id(t) is not None]
        for token in [eod_token] if eod_token else ends[:1]:
            if tokenizer.token_to_id(token) is not None:
                tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        return cls(tokenizer, eod_token)

    @cached_property
    def fingerprint(self) -> str:
        canonical = json.dumps(
            [json.loads(self._tokenizer.to_str()), self.eod_token], sort_keys=True
        )
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]

    def to_bytes(self) -> bytes:
        return self._tokenizer.to_str(pretty=True).encode()

    @cached_property
    def fast(self) -> FastBPE | None:
        """The fast encoder, if it was proved equal at start-up."""
        return FastBPE.proved_equal(self._tokenizer)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        if self.fast is not None:
            return self._sized([self.fast.encode(text) for text in texts])
        if is_byte_level(self._tokenizer):
            found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return self._sized([np.asarray(encoding.ids, np.int32) for encoding in found])
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            encoded_at(text, encoding.ids, [end for _, end in encoding.offsets])
            for text, encoding in zip(texts, found, strict=True)
        ]

    def _sized(self, ids: list[NDArray[np.int32]]) -> list[Encoded]:
        lengths = self._lengths[np.concatenate([np.empty(0, np.int32), *ids])]
        stops = np.cumsum([len(part) for part in ids]).tolist()
        starts = [0, *stops[:-1]]
        return [Encoded(part, lengths[start:stop]) for part, start, stop in zip(ids, starts, stops)]

    @cached_property
    def _lengths(self) -> NDArray[np.integer[Any]]:
        """[vocab_size] in the smallest dtype: a gather of it costs what it moves."""
        lengths = np.asarray([len(data) for data in self.token_bytes])
        return lengths.astype(np.min_scalar_type(lengths.max()))

    def decode_batch(self, token_ids: NDArray[np.integer[Any]]) -> list[str]:
        return self._tokenizer.decode_batch(token_ids.tolist(), skip_special_tokens=True)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        added = self._tokenizer.get_added_tokens_decoder()
        piece_bytes = _byte_level_piece if is_byte_level(self._tokenizer) else plain_piece
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i not in added:
                table[i] = piece_bytes(token)
            elif not added[i].special:
                table[i] = token.encode()
        return table


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return found


def _byte_level_piece(piece: str) -> bytes:
    to_byte = byte_of_character()
    return bytes(to_byte[character] for character in piece)


def plain_piece(piece: str) -> bytes:
    """Bytes of a SentencePiece or WordPiece piece: `▁` is a space, `<0x0A>` a byte, `##` a
    continuation."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.removeprefix("##").replace("▁", " ").encode()


def encoded_at(text: str, ids: Sequence[int], ends: Sequence[int]) -> Encoded:
    """Ids whose tokens end at characters `ends` of the text; what no token covers counts to the
    next one, and the rest of the text to the last."""
    if len(ids) == 0:
        return Encoded(np.empty(0, np.int32), np.empty(0, np.int32))
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    position = np.concatenate([[0], np.cumsum(widths)])
    stops = np.maximum.accumulate(position[np.minimum(np.asarray(ends), len(text))])
    stops[-1] = position[-1]
    return Encoded(np.asarray(ids, np.int32), np.diff(stops, prepend=0).astype(np.int32))
