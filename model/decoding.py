"""Continuous batching: sequences come and go between steps, and each step adds one token to every
sequence in progress.

A step retrieves for the chunks that the tokens about to be read complete, reads them
(`model/incremental.py`), and chooses the next token of each sequence. What a sequence becomes does
not depend on the others. Not safe for threads: one of them calls start, step and cancel.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from model.active_sequence import ActiveSequence, Retrieval, TokenEvent, TopLogprob
from model.generate_config import GenerateConfig, GenerationError
from model.incremental import IncrementalRetro
from model.live_retrieval import ChunkAnswer, RetrievalFailedError, retrieve_chunks
from model.retriever import Retriever
from model.retro import Retro
from model.text_stream import Decode, TextStream

__all__ = [
    "ActiveSequence",
    "Decoder",
    "Retrieval",
    "RetrievalFailedError",
    "TokenEvent",
    "TopLogprob",
]


class Decoder:
    """Continues up to max_sequences prompts at a time.

    Args:
        model: On any device; set to evaluation mode.
        max_sequences: Their memory is taken at once.
        max_length: Of a sequence: pads, prompt and new tokens.
        max_neighbors: Most that a sequence may ask for.
        decode: Token ids to text; None: events carry no text and there are no stop strings.
        pad_id: Of the tokenizer; None: prompts are not padded.
    """

    def __init__(
        self,
        model: Retro,
        max_sequences: int,
        max_length: int,
        max_neighbors: int = 2,
        decode: Decode | None = None,
        pad_id: int | None = None,
    ) -> None:
        if max_sequences < 1 or max_length < 1:
            raise GenerationError(
                f"max_sequences is {max_sequences}, max_length {max_length}; expected at least 1"
            )
        self._config = model.config
        self._max_sequences, self._max_length = max_sequences, max_length
        self._max_neighbors = max_neighbors
        self._decode, self._pad_id = decode, pad_id
        self._model = IncrementalRetro(model, max_sequences, max_length, max_neighbors)
        self._running: list[ActiveSequence] = []

    @property
    def running(self) -> tuple[ActiveSequence, ...]:
        """In the order in which they were started."""
        return tuple(self._running)

    @property
    def free(self) -> int:
        """How many more sequences can be started."""
        return self._max_sequences - len(self._running)

    def start(
        self, prompt: Sequence[int], config: GenerateConfig, retriever: Retriever | None
    ) -> ActiveSequence:
        """Takes a prompt in; the next step reads it.

        Raises:
            GenerationError: there is no room, the prompt is empty, too long or outside the
                vocabulary, or an option cannot be served.
        """
        prompt = list(prompt)
        is_on = retriever is not None and config.neighbors > 0
        self._check_options(config, is_on)
        is_on = is_on and not retriever.is_empty()  # type: ignore[union-attr]
        missing = -len(prompt) % self._config.chunk_size if config.pad_tokens and is_on else 0
        self._check_prompt(prompt, missing, config.max_new_tokens)
        text = None if self._decode is None else TextStream(self._decode, prompt, config.stop)
        pads = [] if self._pad_id is None else [self._pad_id] * missing
        sequence = ActiveSequence(prompt, pads, config, retriever if is_on else None, text)
        self._running.append(sequence)
        return sequence

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """One token for each sequence in progress, in the order in which they were started.

        Raises:
            RetrievalFailedError: nothing has changed; cancel the sequences that it names, or try
                again.
        """
        m, eod = self._config.chunk_size, self._config.eod_id
        answers = retrieve_chunks(query for s in self._running for query in s.queries(m))
        logits = self._read(answers)
        events = [
            sequence.add_token(logits[sequence], eod, answers.get(sequence, {}), m)
            for sequence in self._running
        ]
        for event in events:
            if event.finish_reason is not None:
                self._remove(event.sequence)
        return events

    def cancel(self, sequence: ActiveSequence) -> None:
        """Ends a sequence without a further token; nothing happens if it has ended."""
        if sequence in self._running:
            self._remove(sequence)
            sequence.finish_reason = "cancelled"

    def _remove(self, sequence: ActiveSequence) -> None:
        self._running.remove(sequence)
        if sequence.row is not None:
            self._model.cache.remove_row(sequence.row)
            sequence.row = None

    def _check_options(self, config: GenerateConfig, is_on: bool) -> None:
        if is_on and not self._config.has_retrieval:
            raise GenerationError("this is a plain decoder; it generates without a retriever only")
        if is_on and config.neighbors > self._max_neighbors:
            raise GenerationError(
                f"neighbors is {config.neighbors}; this decoder has room for at most "
                f"{self._max_neighbors}"
            )
        if config.stop and self._decode is None:
            raise GenerationError("stop strings need a function that decodes tokens to text")
        if config.pad_tokens and self._pad_id is None:
            raise GenerationError("pad_tokens needs the tokenizer's pad id")
        if config.logprobs > self._config.vocab_size:
            raise GenerationError(
                f"logprobs is {config.logprobs}; the vocabulary has {self._config.vocab_size} "
                "tokens"
            )

    def _check_prompt(self, prompt: Sequence[int], num_pads: int, new_tokens: int) -> None:
        vocabulary, length = self._config.vocab_size, num_pads + len(prompt) + new_tokens
        if not self.free:
            raise GenerationError(
                f"{self._max_sequences} sequences are in progress; wait until one ends"
            )
        if not prompt or min(prompt) < 0 or max(prompt) >= vocabulary:
            raise GenerationError(
                f"the prompt has {len(prompt)} tokens; expected at least one, all in "
                f"0..{vocabulary - 1}"
            )
        if length > self._max_length:
            raise GenerationError(
                f"{num_pads} pads, {len(prompt)} tokens of the prompt and {new_tokens} new ones "
                f"are {length}; expected at most {self._max_length}"
            )

    def _read(
        self, answers: Mapping[ActiveSequence, Mapping[int, ChunkAnswer]]
    ) -> dict[ActiveSequence, Tensor]:
        """[V] float32 logits on the CPU after the last token of each sequence: first of those that
        have a row, whose rows must be all there are, then of new ones."""
        m, started = self._config.chunk_size, [s for s in self._running if s.row is not None]
        started.sort(key=lambda s: s.row.index)  # type: ignore[union-attr]
        logits: dict[ActiveSequence, Tensor] = {}
        if started:
            neighbors = []
            for sequence in started:
                answer = next(iter(answers.get(sequence, {}).values()), None)
                neighbors.append(None if answer is None else answer.encoder_input)
            found = self._model.step([s.tokens[-1] for s in started], neighbors)
            logits.update(zip(started, found.float().cpu()))
        for sequence in self._running:
            if sequence.row is None:
                tokens = [*sequence.pads, *sequence.tokens]
                own = answers.get(sequence, {})
                chunks = [
                    own[u].encoder_input if u in own else None for u in range(len(tokens) // m)
                ]
                row = self._model.cache.add_row(len(sequence.pads), sequence.is_retrieving)
                sequence.row = row
                logits[sequence] = self._model.read_prompt(row, tokens, chunks).float().cpu()
        return logits
