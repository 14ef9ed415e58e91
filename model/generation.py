"""Continues prompts, retrieving whenever a chunk of the text is complete: all results at the end,
or event by event.

Over `model/decoding.py`; what retrieves is behind the protocol in `model/retriever.py`.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from model.decoding import ActiveSequence, Decoder, Retrieval, TokenEvent, TopLogprob
from model.generate_config import GenerateConfig, GenerationError
from model.retriever import Retriever
from model.retro import Retro
from model.text_stream import Decode

__all__ = ["GenerateConfig", "Generation", "GenerationError", "generate", "stream"]


@dataclass
class Generation:
    """A continued prompt.

    Attributes:
        tokens: All, prompt included.
        prompt_tokens: How many of them are the prompt's.
        text: Of the new tokens, up to a stop string; "" without `decode`.
        finish_reason: eod, stop or length.
        logprobs: Of each new token in the model's own distribution.
        top_logprobs: The most likely tokens in place of each new one, as many as config.logprobs.
        retrievals: What was retrieved on the way.
    """

    tokens: list[int]
    prompt_tokens: int
    text: str = ""
    finish_reason: str = ""
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[TopLogprob, ...]] = field(default_factory=list)
    retrievals: list[Retrieval] = field(default_factory=list)

    def add(self, event: TokenEvent) -> None:
        self.tokens.append(event.token)
        self.text += event.text
        self.finish_reason = event.finish_reason or ""
        self.logprobs.append(event.logprob)
        self.top_logprobs.append(event.top_logprobs)
        self.retrievals += event.retrievals


def generate(
    model: Retro,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig | Sequence[GenerateConfig],
    retriever: Retriever | None,
    decode: Decode | None = None,
    pad_id: int | None = None,
    max_sequences: int = 16,
) -> list[Generation]:
    """Continues each prompt; without a retriever, retrieval is off.

    Args:
        model: Set to evaluation mode.
        prompts: Token ids.
        config: Of all prompts, or of each.
        retriever: Of all prompts.
        decode: Token ids to text; needed for text and stop strings.
        pad_id: Of the tokenizer; needed for pad_tokens.
        max_sequences: How many are continued at a time.

    Raises:
        GenerationError: see `Decoder.start`.
        RetrievalFailedError: the retriever raised.
    """
    results = [Generation(list(prompt), len(prompt)) for prompt in prompts]
    events = stream(model, prompts, config, retriever, decode, pad_id, max_sequences)
    for index, event in events:
        results[index].add(event)
    return results


def stream(
    model: Retro,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig | Sequence[GenerateConfig],
    retriever: Retriever | None,
    decode: Decode | None = None,
    pad_id: int | None = None,
    max_sequences: int = 16,
) -> Iterator[tuple[int, TokenEvent]]:
    """The same, as (index of the prompt, its next token) while they are made."""
    configs = [config] * len(prompts) if isinstance(config, GenerateConfig) else list(config)
    if len(configs) != len(prompts):
        raise GenerationError(f"{len(configs)} configurations for {len(prompts)} prompts")
    decoder = _decoder(model, prompts, configs, decode, pad_id, max_sequences)
    waiting = deque(enumerate(zip(prompts, configs)))
    places: dict[ActiveSequence, int] = {}
    while waiting or decoder.running:
        while waiting and decoder.free:
            index, (prompt, own) = waiting.popleft()
            places[decoder.start(prompt, own, retriever)] = index
        for event in decoder.step():
            yield places[event.sequence], event


def _decoder(
    model: Retro,
    prompts: Sequence[Sequence[int]],
    configs: list[GenerateConfig],
    decode: Decode | None,
    pad_id: int | None,
    max_sequences: int,
) -> Decoder:
    """With as much memory as the prompts need."""
    lengths = [len(prompt) + own.max_new_tokens for prompt, own in zip(prompts, configs)]
    length = max(lengths, default=0) + model.config.chunk_size
    neighbors = max((own.neighbors for own in configs), default=0)
    count = min(max_sequences, max(len(prompts), 1))
    return Decoder(model, count, length, neighbors, decode, pad_id)
