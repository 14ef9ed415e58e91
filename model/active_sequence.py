"""A sequence in progress: which chunks are to be retrieved for, and how logits become its next
token and the event that tells of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.decoding_cache import Row
from model.generate_config import GenerateConfig
from model.live_retrieval import ChunkAnswer, ChunkQuery
from model.retriever import Neighbor, Retriever
from model.sampling import choose_token, penalize_repetition
from model.text_stream import TextStream

FinishReason = Literal["eod", "stop", "length"]


@dataclass(frozen=True)
class TopLogprob:
    """A likely token with its log-probability."""

    token: int
    logprob: float


@dataclass(frozen=True)
class Retrieval:
    """The neighbors of a chunk, best first, visible from token `position` of the sequence on: they
    take part in the prediction of the one after it."""

    position: int
    neighbors: tuple[Neighbor, ...]


@dataclass(frozen=True)
class TokenEvent:
    """One more token.

    Attributes:
        sequence: Whose.
        token: Its id.
        logprob: In the model's own distribution, before any option acts; so are top_logprobs.
        top_logprobs: The most likely tokens, as many as config.logprobs.
        text: Released by it: may lack what could still become a stop string or is no whole
            character, and have what was held back before. Always "" without `decode`.
        retrievals: What was retrieved just before it, in the order of the chunks.
        finish_reason: Not None on a sequence's last token.
    """

    sequence: "ActiveSequence"
    token: int
    logprob: float
    top_logprobs: tuple[TopLogprob, ...]
    text: str
    retrievals: tuple[Retrieval, ...]
    finish_reason: FinishReason | None


class ActiveSequence:
    """A prompt that is being continued.

    Attributes:
        tokens: Of the prompt, without pads, and those chosen so far.
        prompt_tokens: How many of them are the prompt's.
        config: How it is continued.
        finish_reason: None while it is in progress; "cancelled" after `Decoder.cancel`.
        pads: What stands at the left of tokens.
        retriever: None: retrieval is off.
        row: Its place in the cache; None until the prompt is read, and at the end.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        pads: Sequence[int],
        config: GenerateConfig,
        retriever: Retriever | None,
        text: TextStream | None,
    ) -> None:
        self.tokens, self.pads = list(prompt), list(pads)
        self.prompt_tokens = len(self.tokens)
        self.config, self.retriever = config, retriever
        self.finish_reason: FinishReason | Literal["cancelled"] | None = None
        self.row: Row | None = None
        self._text = text
        self._random = torch.Generator().manual_seed(config.seed)

    @property
    def is_retrieving(self) -> bool:
        """Whether retrieval is on."""
        return self.retriever is not None

    def queries(self, chunk_size: int) -> "list[ChunkQuery[ActiveSequence]]":
        """The chunks that the tokens about to be read complete, where retrieval is due."""
        retriever, config, m = self.retriever, self.config, chunk_size
        begin = 0 if self.row is None else self.row.length
        end = len(self.pads) + len(self.tokens)
        due = [u for u in range(begin // m, end // m) if u % config.retrieval_interval == 0]
        if retriever is None or not due:
            return []
        tokens = [*self.pads, *self.tokens]
        return [
            ChunkQuery(self, u, tokens[u * m : u * m + m], retriever, config.neighbors) for u in due
        ]

    def add_token(
        self, logits_V: Tensor, eod_id: int, answers: Mapping[int, ChunkAnswer], chunk_size: int
    ) -> TokenEvent:
        """Chooses the next token.

        Args:
            logits_V: float32, on the CPU.
            eod_id: The end-of-document token.
            answers: By chunk: what was retrieved since the last token.
            chunk_size: Tokens of a chunk.
        """
        logprobs_V = logits_V.log_softmax(0)
        token = self._choose(logits_V, eod_id)
        self.tokens.append(token)
        best, places = logprobs_V.topk(self.config.logprobs)
        top = tuple(TopLogprob(t, p) for t, p in zip(places.tolist(), best.tolist()))
        first = chunk_size - 1 - len(self.pads)
        retrievals = tuple(
            Retrieval(u * chunk_size + first, answer.found) for u, answer in answers.items()
        )
        text, reason = self._finish(token, eod_id)
        self.finish_reason = reason
        return TokenEvent(self, token, float(logprobs_V[token]), top, text, retrievals, reason)

    def _choose(self, logits_V: Tensor, eod_id: int) -> int:
        config = self.config
        if config.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(self.tokens)))
            logits_V = penalize_repetition(logits_V, seen, config.repetition_penalty)
        if len(self.tokens) - self.prompt_tokens < config.min_new_tokens:
            logits_V = logits_V.index_fill(0, torch.tensor([eod_id]), -torch.inf)
        return choose_token(logits_V, config.temperature, config.top_k, config.top_p, self._random)

    def _finish(self, token: int, eod_id: int) -> tuple[str, FinishReason | None]:
        """The text that the last token releases, and why the sequence ends with it, if it does."""
        count, reason = len(self.tokens) - self.prompt_tokens, None
        if token == eod_id:
            reason = "eod"
        elif count == self.config.max_new_tokens:
            reason = "length"
        if self._text is None:
            return "", reason
        text = "" if token == eod_id else self._text.push(token)
        if reason is not None:
            text += self._text.finish()
        return text, "stop" if self._text.is_stopped else reason
