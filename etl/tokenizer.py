"""Tokenizers: text to token ids and back, with the pad and end-of-document ids a dataset needs.

Used by preparation (encode), indexing (decode), evaluation (bytes of each token) and generation.
`etl/huggingface_tokenizer.py` and `etl/sentencepiece_tokenizer.py` are the two kinds.
"""

import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etl.storage import filesystem_of, join_url, read_bytes

PAD_TOKEN = "<|pad|>"
EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class TokenizerError(ValueError):
    """Tokenizer files that are missing, or of a kind that the data path cannot use."""


@dataclass(frozen=True)
class Encoded:
    """A text's token ids [n] and how many of its UTF-8 bytes each stands for [n]; they add up to
    the whole text."""

    ids: NDArray[np.integer[Any]]
    byte_lengths: NDArray[np.integer[Any]]


class TextTokenizer(ABC):
    """Special-token strings inside text are encoded as ordinary text: a document cannot forge an
    end-of-document."""

    pad_id: int
    eod_id: int
    eod_token: str
    vocab_size: int
    has_added_pad: bool

    @cached_property
    @abstractmethod
    def fingerprint(self) -> str:
        """32 hex digits over everything that determines the ids."""

    @abstractmethod
    def to_bytes(self) -> bytes:
        """The file that `restore_tokenizer` reads back with the same fingerprint."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Without end-of-document tokens."""

    @abstractmethod
    def decode_batch(self, token_ids: NDArray[np.integer[Any]]) -> list[str]:
        """Text of each row of ids [N, n], special tokens dropped; broken UTF-8 at the edges becomes
        U+FFFD."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids [n], special tokens dropped."""
        return self.decode_batch(np.asarray([token_ids], np.int64))[0]

    @cached_property
    @abstractmethod
    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for inside a text; b"" for special tokens. For byte-level
        tokenizers they join to the text exactly."""


def restore_tokenizer(data: bytes, eod_token: str | None = None) -> TextTokenizer:
    """The tokenizer in a `tokenizer.json` or a SentencePiece model, told apart by content.

    Raises:
        TokenizerError: neither of them, or without an end-of-document token.
    """
    if data.lstrip()[:1] == b"{":
        from etl.huggingface_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer.from_json(data.decode(), eod_token)
    from etl.sentencepiece_tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(data, eod_token)


def load_tokenizer(
    url: str, eod_token: str | None = None, need_pad_id: bool = True
) -> TextTokenizer:
    """Reads a `tokenizer.json`, a SentencePiece model (`*.model`), a folder with either of them or
    with GPT-2's `vocab.json` and `merges.txt`, or the tokenizer of a Hugging Face model by name.

    Args:
        eod_token: The end-of-document token; by default the first of EOD_TOKENS that it has, or a
            SentencePiece model's end of sentence.
        need_pad_id: Add a pad token if there is none.

    Raises:
        FileNotFoundError: nothing of that kind is there.
        TokenizerError: the files do not hold a usable tokenizer, or it has no pad token and
            need_pad_id is false.
    """
    tokenizer = (
        _from_gpt2_files(url, eod_token)
        if _is_gpt2_folder(url)
        else restore_tokenizer(_find(url), eod_token)
    )
    if not need_pad_id and tokenizer.has_added_pad:
        raise TokenizerError(
            f"{url}: the tokenizer has no pad token and need_pad_id is false; let one be added, or "
            "name a tokenizer that has one"
        )
    return tokenizer


def _find(url: str) -> bytes:
    filesystem, path = filesystem_of(url)
    if filesystem.isfile(path):
        return _named(url, read_bytes(url))
    for name in ("tokenizer.json", "tokenizer.model"):
        if filesystem.exists(f"{path.rstrip('/')}/{name}"):
            return _named(join_url(url, name), read_bytes(join_url(url, name)))
    if _HUB_NAME.fullmatch(url) and not filesystem.exists(path):
        found = _from_hub(url)
        if found is not None:
            return found
    raise FileNotFoundError(
        f"{url}: expected a tokenizer.json, a SentencePiece .model, a folder with one of them or "
        "with vocab.json and merges.txt, or the name of a model on the Hugging Face hub"
    )


def _named(url: str, data: bytes) -> bytes:
    """`data`, checked so that an error names its file."""
    try:
        restore_tokenizer(data)
    except TokenizerError as error:
        if "end-of-document" not in str(error):
            raise TokenizerError(f"{url}: {error}") from None
    return data


def _from_hub(name: str) -> bytes | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    for file in ("tokenizer.json", "tokenizer.model"):
        try:
            return Path(hf_hub_download(name, file)).read_bytes()
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            continue
    return None


def _is_gpt2_folder(url: str) -> bool:
    """Whether `url` is a folder with GPT-2's two files and no tokenizer.json."""
    filesystem, path = filesystem_of(url)
    names = [f"{path.rstrip('/')}/{n}" for n in ("vocab.json", "merges.txt", "tokenizer.json")]
    here = [filesystem.exists(name) for name in names] if filesystem.isdir(path) else []
    return here == [True, True, False]


def _from_gpt2_files(url: str, eod_token: str | None) -> TextTokenizer:
    from etl.huggingface_tokenizer import HuggingFaceTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name in ("vocab.json", "merges.txt"):
            Path(folder, name).write_bytes(read_bytes(join_url(url, name)))
        try:
            return HuggingFaceTokenizer.from_gpt2_files(Path(folder), eod_token)
        except TokenizerError as error:
            raise TokenizerError(f"{url}: {error}") from None
