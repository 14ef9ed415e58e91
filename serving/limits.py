"""What a server takes at most: sizes of requests, of the queue and of the work in progress, and how
long any of it may take. Data, and the checks that need nothing but them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from model.generate_config import GenerateConfig
from serving.errors import InvalidRequestError, TooLargeError


@dataclass(frozen=True)
class Limits:
    """Of one server.

    Attributes:
        max_sequences: Sequences that are continued at a time; their memory is taken at the start.
        max_queued: Sequences that wait for their turn; beyond them requests are refused (429).
        max_choices: Sequences of one request: prompts times n.
        max_prompt_tokens: Of a prompt.
        max_new_tokens: That a request may ask for.
        max_neighbors: Of a chunk.
        max_stop: Stop strings of a request.
        max_stop_characters: Of a stop string.
        max_logprobs: Most likely tokens that are reported for each token.
        max_body_bytes: Of a request.
        max_documents: That one request adds.
        max_document_characters: Of a document as JSON.
        max_texts: Texts of one retrieval request.
        max_text_characters: Of each of them.
        timeout_s: Seconds from a request's arrival to its last token.
        grace_s: Seconds that requests in progress have to end when the server is stopped.

    Raises:
        ValueError: limits under which no request could be served.
    """

    max_sequences: int = 16
    max_queued: int = 256
    max_choices: int = 16
    max_prompt_tokens: int = 1536
    max_new_tokens: int = 512
    max_neighbors: int = 4
    max_stop: int = 8
    max_stop_characters: int = 256
    max_logprobs: int = 20
    max_body_bytes: int = 8 << 20
    max_documents: int = 1000
    max_document_characters: int = 1_000_000
    max_texts: int = 64
    max_text_characters: int = 20_000
    timeout_s: float = 120.0
    grace_s: float = 20.0

    def __post_init__(self) -> None:
        may_be_zero = {"max_neighbors", "max_stop", "max_logprobs", "grace_s"}
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name not in may_be_zero):
                raise ValueError(f"{name} is {value}; expected a number above 0")
        if self.max_queued < self.max_choices:
            raise ValueError(
                f"max_queued {self.max_queued} is below max_choices {self.max_choices}: the "
                "largest request would never be taken; raise max_queued"
            )

    def check_choices(self, choices: int) -> None:
        """
        Raises:
            InvalidRequestError: more prompts times n than allowed.
        """
        _check("max_choices", "prompt", choices, self.max_choices)

    def check_options(self, config: GenerateConfig) -> None:
        """
        Raises:
            InvalidRequestError: naming the option that is above its limit.
        """
        found = {
            "max_new_tokens": ("max_tokens", config.max_new_tokens),
            "max_neighbors": ("neighbors", config.neighbors),
            "max_logprobs": ("logprobs", config.logprobs),
            "max_stop": ("stop", len(config.stop)),
            "max_stop_characters": ("stop", max(map(len, config.stop), default=0)),
        }
        for name, (param, value) in found.items():
            _check(name, param, value, getattr(self, name))

    def check_prompt(self, tokens: Sequence[int]) -> None:
        """
        Raises:
            InvalidRequestError: more tokens than allowed.
        """
        _check("max_prompt_tokens", "prompt", len(tokens), self.max_prompt_tokens)

    def check_texts(self, texts: Sequence[str], neighbors: int) -> None:
        """Of a retrieval request.

        Raises:
            InvalidRequestError: too many neighbors.
            TooLargeError: too many texts, or too long ones.
        """
        _check("max_neighbors", "neighbors", neighbors, self.max_neighbors)
        longest = max(map(len, texts), default=0)
        _check_size("max_texts", "texts", len(texts), self.max_texts)
        _check_size("max_text_characters", "texts", longest, self.max_text_characters)

    def check_documents(self, sizes: Sequence[int]) -> None:
        """
        Args:
            sizes: Characters of each document as JSON.

        Raises:
            TooLargeError: too many documents, or too long ones.
        """
        longest = max(sizes, default=0)
        _check_size("max_documents", "documents", len(sizes), self.max_documents)
        _check_size("max_document_characters", "documents", longest, self.max_document_characters)


def _check(name: str, param: str, found: int, allowed: int) -> None:
    if found > allowed:
        raise InvalidRequestError(
            f"{param}: {found} is above this server's {name} of {allowed}", param, name
        )


def _check_size(name: str, param: str, found: int, allowed: int) -> None:
    if found > allowed:
        raise TooLargeError(f"{param}: {found} is above this server's {name} of {allowed}", param)
