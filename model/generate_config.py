"""What can be asked of generation, for each sequence. Data only."""

import math
from dataclasses import dataclass


class GenerationError(ValueError):
    """A prompt or options from which nothing can be generated."""


@dataclass(frozen=True)
class GenerateConfig:
    """How to continue a prompt. Repetition penalty, temperature, top_k and top_p act in this order.

    Attributes:
        max_new_tokens: Tokens to generate at most; generation also ends after an end-of-document
            token.
        min_new_tokens: An end-of-document token is not chosen before there are as many tokens.
        temperature: Divides the logits; 0 takes the most likely token always.
        top_k: Only the k most likely tokens can be drawn; 0: all of them. No effect at temperature
            0, so refused there.
        top_p: Only the fewest most likely tokens whose probabilities sum up to it can be drawn; 1:
            all of them. No effect at temperature 0, so refused there.
        repetition_penalty: Makes tokens of the prompt and of the text so far less likely if above
            1, more likely if below.
        stop: Strings that end the text; they are not part of it.
        seed: Of the draws; they depend on nothing else that is generated at the same time.
        logprobs: Report as many most likely tokens at each position with their log-probabilities.
        neighbors: Neighbors of each chunk; 0 turns retrieval off.
        retrieval_interval: Retrieve for chunks 0, n, 2n, ... of the sequence; the others have no
            neighbors.
        pad_tokens: Fill the prompt's first chunk up from the left with pads, so that a short prompt
            is retrieved for at once. Nothing happens where retrieval is off.

    Raises:
        GenerationError: values out of range.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: int = 0
    neighbors: int = 2
    retrieval_interval: int = 1
    pad_tokens: bool = False

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise GenerationError(f"{name} is {value}; expected a number of at least {least}")
        if self.seed >= 1 << 63:
            raise GenerationError(f"seed is {self.seed}; expected a number below 2^63")
        if self.min_new_tokens > self.max_new_tokens:
            raise GenerationError(
                f"min_new_tokens {self.min_new_tokens} is above max_new_tokens "
                f"{self.max_new_tokens}; lower it"
            )
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p is {self.top_p}; expected a number above 0, at most 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise GenerationError(
                f"repetition_penalty is {self.repetition_penalty}; expected a number above 0"
            )
        if not all(self.stop):
            raise GenerationError("a stop string is empty; it would end every text at once")
        self._check_greedy()

    def _check_greedy(self) -> None:
        ignored = {"top_k": self.top_k != 0, "top_p": self.top_p != 1}
        for name, is_set in ignored.items():
            if self.temperature == 0 and is_set:
                raise GenerationError(f"{name} has no effect at temperature 0; set one of them")


_LEAST = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "temperature": 0,
    "top_k": 0,
    "seed": 0,
    "logprobs": 0,
    "neighbors": 0,
    "retrieval_interval": 1,
}
