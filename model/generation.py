"""Generation that retrieves: whenever a chunk of the text is complete, its neighbors are looked up
and attended to.

Each new token is a full forward pass over the sequence so far. What retrieves is behind the
`Retriever` protocol, so the model knows nothing of indexes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from model.retro import Retro


class GenerationError(ValueError):
    """A prompt or options from which nothing can be generated."""


class Retriever(Protocol):
    """Finds neighbors of chunks that were just written."""

    def retrieve(
        self, chunks: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """(ids [C, K], tokens [C, K, R], mask [C, K, R]) for chunks [C, chunk_size]; id -1 is a
        missing neighbor."""
        ...


@dataclass(frozen=True)
class GenerateConfig:
    """How to choose tokens.

    Attributes:
        max_new_tokens: Tokens to generate; generation also ends after an end-of-document token.
        temperature: Divides the logits; 0 takes the most likely token always.
        top_k: Only the k most likely tokens can be drawn; 0: all of them. No effect at temperature
            0, so refused there.
        seed: Of the draws.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0:
            raise GenerationError(
                f"max_new_tokens {self.max_new_tokens}, temperature {self.temperature}, top_k "
                f"{self.top_k}; expected at least 1, 0 and 0"
            )
        if self.temperature == 0 and self.top_k:
            raise GenerationError("top_k has no effect at temperature 0; set one of them")


@dataclass(frozen=True)
class Retrieval:
    """The neighbors that were visible from token `position` of the sequence on."""

    position: int
    neighbor_ids: list[int]


@dataclass
class Generation:
    """All tokens, prompt included, and the retrievals that happened on the way."""

    tokens: list[int]
    prompt_tokens: int
    retrievals: list[Retrieval] = field(default_factory=list)


@torch.no_grad()
def generate(
    model: Retro, prompt: Sequence[int], config: GenerateConfig, retriever: Retriever | None
) -> Generation:
    """Continues the prompt; without a retriever, retrieval is off.

    Token t sees neighbors of chunk u iff t >= (u + 1) * chunk_size - 1, as in training: a chunk's
    neighbors help from the prediction that follows its last token.

    Raises:
        GenerationError: an empty prompt, ids outside the vocabulary, or a retriever for a plain
            decoder.
    """
    _check(model, prompt, retriever)
    result = Generation(list(prompt), len(prompt))
    memory = _Neighbors(model.config.chunk_size, retriever)
    random = torch.Generator().manual_seed(config.seed)
    for _ in range(config.max_new_tokens):
        memory.extend(result)
        tokens = torch.tensor([result.tokens])
        logits = model(tokens, torch.ones_like(tokens, dtype=torch.bool), *memory.tensors())
        token = choose_token(logits[0, -1].float(), config, random)
        result.tokens.append(token)
        if token == model.config.eod_id:
            break
    return result


def _check(model: Retro, prompt: Sequence[int], retriever: Retriever | None) -> None:
    vocabulary = model.config.vocab_size
    if not prompt or min(prompt) < 0 or max(prompt) >= vocabulary:
        raise GenerationError(
            f"the prompt has {len(prompt)} tokens; expected at least one, all in "
            f"0..{vocabulary - 1}"
        )
    if retriever is not None and not model.config.has_retrieval:
        raise GenerationError("this is a plain decoder; it generates without a retriever only")


class _Neighbors:
    """Neighbors of the complete chunks of one growing sequence."""

    def __init__(self, chunk_size: int, retriever: Retriever | None) -> None:
        self.chunk_size, self.retriever = chunk_size, retriever
        self.tokens: list[NDArray[np.int64]] = []
        self.masks: list[NDArray[np.bool_]] = []

    def extend(self, generation: Generation) -> None:
        """Retrieves for the chunks that became complete since the last call."""
        m, done = self.chunk_size, len(self.tokens)
        complete = len(generation.tokens) // m
        if self.retriever is None or complete == done:
            return
        chunks = np.asarray(generation.tokens[done * m : complete * m], np.int64).reshape(-1, m)
        ids, tokens, masks = self.retriever.retrieve(chunks)
        self.tokens += list(tokens)
        self.masks += list(masks)
        for u, row in enumerate(ids, start=done):
            found = [int(i) for i in row if i >= 0]
            generation.retrievals.append(Retrieval((u + 1) * m - 1, found))

    def tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not self.tokens:
            return None, None
        tokens, masks = np.stack(self.tokens), np.stack(self.masks)
        return torch.from_numpy(tokens)[None], torch.from_numpy(masks)[None]


def choose_token(logits_V: torch.Tensor, config: GenerateConfig, random: torch.Generator) -> int:
    """The most likely token, or one drawn from the k most likely."""
    if config.temperature == 0:
        return int(logits_V.argmax())
    if config.top_k:
        least = logits_V.topk(min(config.top_k, len(logits_V))).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, float("-inf"))
    probabilities = torch.softmax(logits_V / config.temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=random))
