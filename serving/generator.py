"""Text in, events out: the one way to the engine, for the HTTP routes and for the page in the same
process.

    prompts (text or token ids) -> tokens -> limits -> services held still -> engine's queue -> Job
"""

from collections.abc import Sequence
from typing import TypeAlias

from starlette.concurrency import run_in_threadpool

from etl.tokenizer import TextTokenizer
from model.generate_config import GenerateConfig
from serving.engine import Engine, Job, Prompt
from serving.errors import InvalidRequestError
from serving.limits import Limits
from serving.measures import MeasuredRetriever, Measures
from serving.services import RetrievalServices

PromptInput: TypeAlias = str | Sequence[int]

DEFAULT_NEIGHBORS = 2


class TextGenerator:
    """A model that is being served, with what it retrieves from.

    Attributes:
        name: Of the model, as clients name it.
        engine: Started.
        tokenizer: The model's.
        services: None: there is nothing to retrieve from.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        tokenizer: TextTokenizer,
        services: RetrievalServices | None,
    ) -> None:
        self.name, self.engine = name, engine
        self.tokenizer, self.services = tokenizer, services
        documents = None if services is None else services.dynamic
        if documents is not None:
            observe = self.measures.observe
            observe("live_documents", "Documents added", lambda: documents.num_documents)
            observe("live_chunks", "Their chunks", lambda: documents.num_chunks)

    @property
    def limits(self) -> Limits:
        return self.engine.limits

    @property
    def measures(self) -> Measures:
        return self.engine.measures

    @property
    def default_neighbors(self) -> int:
        return min(DEFAULT_NEIGHBORS, self.limits.max_neighbors)

    def wants_retrieval(self, asked: bool | None) -> bool:
        """Whether a request is to retrieve; without a word of it, wherever there are services.

        Raises:
            InvalidRequestError: it asks for what is not there.
        """
        if asked and self.services is None:
            raise InvalidRequestError(
                "retrieval: this server has no retrieval services; leave it out or set it to false",
                "retrieval",
                "no_retrieval",
            )
        return self.services is not None and asked is not False

    async def open(
        self,
        prompts: Sequence[PromptInput],
        configs: GenerateConfig | Sequence[GenerateConfig],
        retrieval: bool,
    ) -> Job:
        """Queues the prompts, all or none. What their sequences retrieve from is what there is now.

        Args:
            configs: Of all prompts, or of each.
            retrieval: Whether to retrieve; see `wants_retrieval`.

        Raises:
            InvalidRequestError: above a limit, or no tokens.
            QueueFullError, ShuttingDownError: see `Engine.submit`.
        """
        self.limits.check_choices(len(prompts))
        each = [configs] * len(prompts) if isinstance(configs, GenerateConfig) else configs
        for config in each:
            self.limits.check_options(config)
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(await run_in_threadpool(self.encode, texts) if texts else [])
        tokens = [next(encoded) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        for ids in tokens:
            self._check(ids)
        pinned = self.services.combined.pinned() if retrieval and self.services else None
        return self.engine.submit(
            [
                Prompt(ids, config, pinned and MeasuredRetriever(pinned, self.measures))
                for ids, config in zip(tokens, each, strict=True)
            ]
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; special tokens in it are text."""
        return [encoded.ids.tolist() for encoded in self.tokenizer.encode_batch(texts)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones dropped."""
        return self.tokenizer.decode(token_ids)

    def token_text(self, token: int) -> str:
        """Of a single token, for people: `bytes:...` where it is no whole character."""
        if token in self._special:
            return self._special[token]
        part = self.tokenizer.token_bytes[token]
        try:
            return part.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in part)

    @property
    def _special(self) -> dict[int, str]:
        return {self.tokenizer.pad_id: "<|pad|>", self.tokenizer.eod_id: self.tokenizer.eod_token}

    def _check(self, ids: Sequence[int]) -> None:
        self.limits.check_prompt(ids)
        if not ids:
            raise InvalidRequestError("prompt: no tokens; expected some text", "prompt", "empty")
        if min(ids) < 0 or max(ids) >= self.tokenizer.vocab_size:
            raise InvalidRequestError(
                f"prompt: token ids {min(ids)} to {max(ids)}; expected them in "
                f"0..{self.tokenizer.vocab_size - 1}",
                "prompt",
            )
