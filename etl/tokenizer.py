"""Byte-level BPE tokenizers: text to token ids and back, with the pad and end-of-document ids a
dataset needs.

Used by preparation (encode), indexing (decode), evaluation (bytes of each token) and generation.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from etl.storage import filesystem_of, join_url, read_bytes

PAD_TOKEN = "<|pad|>"
EOD_TOKEN = "<|endoftext|>"


class TokenizerError(ValueError):
    """Tokenizer files that are missing, or of a kind that the data path cannot use."""


class ByteLevelTokenizer:
    """A byte-level BPE tokenizer with a pad token (added when missing) and an end-of-document
    token.

    Special-token strings inside text are encoded as ordinary text: a document cannot forge an
    end-of-document.

    Raises:
        TokenizerError: not byte-level BPE, or no end-of-document token.
    """

    def __init__(self, tokenizer: Tokenizer, eod_token: str = EOD_TOKEN) -> None:
        if "ByteLevel" not in _component_types(tokenizer) or not isinstance(tokenizer.model, BPE):
            raise TokenizerError(
                "expected a byte-level BPE tokenizer (as GPT-2 or Llama 3 have), found another kind"
            )
        if tokenizer.token_to_id(eod_token) is None:
            raise TokenizerError(
                f"the tokenizer has no end-of-document token {eod_token!r}; name its own with "
                "eod_token"
            )
        if tokenizer.token_to_id(PAD_TOKEN) is None:
            tokenizer.add_special_tokens([AddedToken(PAD_TOKEN, special=True, normalized=False)])
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.eod_token = eod_token
        self.pad_id = _id_of(tokenizer, PAD_TOKEN)
        self.eod_id = _id_of(tokenizer, eod_token)
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits over everything that determines the ids."""
        canonical = json.dumps(
            [json.loads(self._tokenizer.to_str()), self.eod_token], sort_keys=True
        )
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]

    def to_json(self) -> str:
        """The `tokenizer.json` that `load_tokenizer` reads back with the same fingerprint."""
        return self._tokenizer.to_str(pretty=True)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without end-of-document."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode_batch(self, token_ids: NDArray[np.integer[Any]]) -> list[str]:
        """Text of each row of ids [N, n], special tokens dropped; broken UTF-8 at the edges becomes
        U+FFFD."""
        return self._tokenizer.decode_batch(token_ids.tolist(), skip_special_tokens=True)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for; b"" for special tokens. Concatenated they are the text
        exactly."""
        table = [b""] * self.vocab_size
        to_byte = _byte_of_character()
        special = {
            i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        }
        added = self._tokenizer.get_added_tokens_decoder()
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i in added:
                table[i] = b"" if i in special else token.encode()
            else:
                table[i] = bytes(to_byte[character] for character in token)
        return table

    @cached_property
    def token_lengths(self) -> NDArray[np.int64]:
        """[vocab_size] number of bytes of each id."""
        return np.asarray([len(data) for data in self.token_bytes], np.int64)


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return found


def _component_types(tokenizer: Tokenizer) -> set[str]:
    """Names of the pre-tokenizer's parts."""
    spec = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
    return {part["type"] for part in [spec, *spec.get("pretokenizers", [])] if "type" in part}


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def load_tokenizer(url: str, eod_token: str = EOD_TOKEN) -> ByteLevelTokenizer:
    """Reads a `tokenizer.json`, or a folder with `tokenizer.json` or GPT-2's `vocab.json` and
    `merges.txt`.

    Raises:
        FileNotFoundError: none of these files is there.
        TokenizerError: the files do not hold a byte-level BPE tokenizer.
    """
    filesystem, path = filesystem_of(url)
    if filesystem.isfile(path):
        return ByteLevelTokenizer(_from_json(url), eod_token)
    if filesystem.exists(path.rstrip("/") + "/tokenizer.json"):
        return ByteLevelTokenizer(_from_json(join_url(url, "tokenizer.json")), eod_token)
    if filesystem.exists(path.rstrip("/") + "/vocab.json") and filesystem.exists(
        path.rstrip("/") + "/merges.txt"
    ):
        return ByteLevelTokenizer(_from_gpt2_files(url, eod_token), eod_token)
    raise FileNotFoundError(
        f"{url}: expected a tokenizer.json, or a folder with it or with vocab.json and merges.txt"
    )


def _from_json(url: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(read_bytes(url).decode())
    except FileNotFoundError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(
            f"{url}: expected a Hugging Face tokenizer.json, found {error}"
        ) from None


def _from_gpt2_files(url: str, eod_token: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("vocab.json", "merges.txt"):
            Path(folder, name).write_bytes(read_bytes(join_url(url, name)))
        try:
            model = BPE.from_file(
                os.path.join(folder, "vocab.json"), os.path.join(folder, "merges.txt")
            )
        except Exception as error:  # tokenizers raises bare Exception
            raise TokenizerError(
                f"{url}: vocab.json and merges.txt do not fit together: {error}"
            ) from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(eod_token) is not None:
        tokenizer.add_special_tokens([AddedToken(eod_token, special=True, normalized=False)])
    return tokenizer
