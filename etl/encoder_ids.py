"""The embedder's token ids of chunk texts, made once in preparation so that embedding workers need
not decode and tokenize."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from etl.manifest import Encoder
from etl.storage import content_key

_PACKAGE = "package:"


class EncoderError(ValueError):
    """An embedder whose tokenizer cannot be used."""


def model_location(name: str) -> str:
    """The folder of a `package:` model, else `name` unchanged.

    Raises:
        EncoderError: the package is not installed or carries no model.
    """
    if not name.startswith(_PACKAGE):
        return name
    package = name.removeprefix(_PACKAGE).replace("-", "_")
    spec = find_spec(package)
    locations = (spec.submodule_search_locations if spec else None) or ()
    folders = [Path(location, "model") for location in locations]
    found = [folder for folder in folders if (folder / "modules.json").exists()]
    if not found:
        raise EncoderError(
            f"{name}: package {package} is not installed or has no folder `model` with a "
            "modules.json"
        )
    return str(found[0])


@lru_cache(maxsize=1)
def _restored(tokenizer_json: str, max_length: int) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


@dataclass(frozen=True)
class EncoderTokenizer:
    """An embedder's tokenizer; picklable."""

    name: str
    tokenizer_json: str
    max_length: int

    @property
    def _tokenizer(self) -> Tokenizer:
        return _restored(self.tokenizer_json, self.max_length)

    @cached_property
    def facts(self) -> Encoder:
        spec = json.loads(self.tokenizer_json)
        pad_id = (spec.get("padding") or {}).get("pad_id", 0)
        return Encoder(self.name, content_key(spec, self.max_length), self.max_length, pad_id)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self._tokenizer.get_vocab_size() <= 1 << 16 else np.int32)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, special tokens included, cut off at max_length."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def rows(self, ids: Sequence[Sequence[int]]) -> NDArray[Any]:
        """[N, width] the ids in rows as wide as the longest, filled up with the pad id."""
        width = max((len(row) for row in ids), default=0)
        out = np.full((len(ids), width), self.facts.pad_id, self.dtype)
        for i, row in enumerate(ids):
            out[i, : len(row)] = row
        return out


def load_encoder_tokenizer(name: str) -> EncoderTokenizer:
    """The tokenizer of a sentence-transformers model: a folder, `package:NAME`, or a hub name.

    Raises:
        EncoderError: no such model, or one without a tokenizer.json.
    """
    folder = Path(model_location(name))
    if not folder.is_dir():
        folder = _from_hub(name)
    if not (folder / "tokenizer.json").exists():
        raise EncoderError(f"{name}: {folder} has no tokenizer.json")
    return EncoderTokenizer(name, (folder / "tokenizer.json").read_text(), _max_length(folder))


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise EncoderError(f"embedder {name}: neither a folder nor on the hub: {error}") from None


def _max_length(folder: Path) -> int:
    """Tokens at which sentence_transformers cuts a text off."""
    for file, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        path = folder / file
        found = json.loads(path.read_text()).get(key) if path.exists() else None
        if found:
            return int(found)
    raise EncoderError(f"{folder}: neither max_seq_length nor model_max_length is given")
