"""`POST /v1/completions`: OpenAI's completions, whole or as a stream, with what was retrieved.

A stream's chunks are the parts of which the whole answer is put together, so both say the same.
"""

import secrets
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from model.active_sequence import Retrieval
from model.decoding import TokenEvent
from model.generate_config import GenerateConfig
from serving.answers import CompletionAnswer
from serving.disconnection import unless_client_leaves
from serving.engine import Job
from serving.errors import (
    InvalidRequestError,
    NotFoundError,
    as_serving_error,
    json_bytes,
    json_response,
)
from serving.generator import PromptInput, TextGenerator
from serving.schemas import CompletionRequest

Json = dict[str, Any]

_DONE = b"data: [DONE]\n\n"
_REASONS = {"eod": "stop", "stop": "stop", "length": "length"}
_RANDOM_SEEDS = 1 << 62
_LAST_SEED = (1 << 63) - 1


def add_completion_route(app: FastAPI, generator: TextGenerator, options: Json) -> None:
    """
    Args:
        options: Of all routes.
    """
    stream = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
    responses = {**options["responses"], **stream}

    @app.post(
        "/v1/completions",
        **{**options, "responses": responses},
        response_model=CompletionAnswer,
    )
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continues prompts, retrieving whenever a chunk of the text is complete."""
        return await answer_completion(generator, body, request)


async def answer_completion(
    generator: TextGenerator, body: CompletionRequest, request: Request
) -> Response:
    """Raises ServingError or GenerationError; once a stream has begun, errors are part of it."""
    _check(generator, body)
    generator.limits.check_choices(len(_prompts(body)) * body.n)
    prompts = [prompt for prompt in _prompts(body) for _ in range(body.n)]
    retrieval = wants_retrieval(generator, body.retrieval, body.neighbors)
    configs = _configs(generator, body, len(prompts))
    async with _Held(await generator.open(prompts, configs, retrieval)) as held:
        answer = _Answer(generator, body, held.job)
        if not body.stream:
            return json_response(await unless_client_leaves(request, answer.whole()))
        parts = answer.parts()
        # Errors of the first step have a status of their own, so they come before the headers.
        first = await unless_client_leaves(request, anext(parts))
        return _Stream(held.released(), answer.chunks(first, parts))


def wants_retrieval(generator: TextGenerator, asked: bool | None, neighbors: int | None) -> bool:
    """Whether to retrieve; a number of neighbors asks for it too.

    Raises:
        InvalidRequestError: it is asked for, and there are no services.
    """
    return generator.wants_retrieval(True if asked is None and neighbors else asked)


def shown_retrieval(retrieval: Retrieval) -> Json:
    """A `RetrievalAnswer`."""
    return {
        "position": retrieval.position,
        "neighbors": [dict(vars(neighbor)) for neighbor in retrieval.neighbors],
    }


def new_seed() -> int:
    return secrets.randbelow(_RANDOM_SEEDS)


class _Held:
    """Ends a job with its block, unless it was released to someone else."""

    def __init__(self, job: Job) -> None:
        self.job, self._is_released = job, False

    async def __aenter__(self) -> "_Held":
        return self

    async def __aexit__(self, *error: Any) -> None:
        if not self._is_released:
            await self.job.__aexit__(*error)

    def released(self) -> Job:
        self._is_released = True
        return self.job


class _Stream(StreamingResponse):
    """A stream that ends its job, however it ends itself."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, chunks: AsyncIterator[bytes]) -> None:
        super().__init__(chunks, headers={"Cache-Control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._job:
            await super().__call__(scope, receive, send)


class _Answer:
    """What one request is answered."""

    def __init__(self, generator: TextGenerator, body: CompletionRequest, job: Job) -> None:
        self._generator, self._body, self._job = generator, body, job
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": generator.name,
        }
        self._tokens = 0
        self._lengths: dict[int, int] = {}

    async def parts(self) -> AsyncIterator[Json]:
        """A choice for each token, with what it adds."""
        async for index, event in self._job.events():
            self._tokens += 1
            yield self._part(index, event)

    async def whole(self) -> Json:
        choices: dict[int, Json] = {}
        async for part in self.parts():
            index = part["index"]
            choices[index] = _joined(choices[index], part) if index in choices else part
        ordered = [choices[index] for index in sorted(choices)]
        return {**self._head, "choices": ordered, "usage": self._usage()}

    async def chunks(self, first: Json, parts: AsyncIterator[Json]) -> AsyncIterator[bytes]:
        """Server-sent events; those that would add nothing are left out."""
        yield self._chunk(first)
        try:
            async for part in parts:
                if part["text"] or part["retrieved"] or part["logprobs"] or part["finish_reason"]:
                    yield self._chunk(part)
        except Exception as error:
            yield _event(as_serving_error(error).body)
        else:
            options = self._body.stream_options
            if options is not None and options.include_usage:
                yield _event({**self._head, "choices": [], "usage": self._usage()})
        yield _DONE

    def _chunk(self, part: Json) -> bytes:
        return _event({**self._head, "choices": [part]})

    def _part(self, index: int, event: TokenEvent) -> Json:
        prefix = self._echoed(index) if index not in self._lengths else ""
        offset = self._lengths.get(index, 0) + len(prefix)
        self._lengths[index] = offset + len(event.text)
        logprobs = None if self._body.logprobs is None else self._logprobs(event, offset)
        return {
            "index": index,
            "text": prefix + event.text,
            "finish_reason": _REASONS.get(event.finish_reason or ""),
            "logprobs": logprobs,
            "retrieved": [shown_retrieval(retrieval) for retrieval in event.retrievals],
        }

    def _echoed(self, index: int) -> str:
        if not self._body.echo:
            return ""
        prompt = _prompts(self._body)[index // self._body.n]
        return prompt if isinstance(prompt, str) else self._generator.decode(prompt)

    def _logprobs(self, event: TokenEvent, offset: int) -> Json:
        text = self._generator.token_text
        return {
            "tokens": [text(event.token)],
            "token_logprobs": [event.logprob],
            "top_logprobs": [{text(top.token): top.logprob for top in event.top_logprobs}],
            "text_offset": [offset],
        }

    def _usage(self) -> Json:
        given = sum(len(prompt.tokens) for prompt in self._job.prompts[:: self._body.n])
        return {
            "prompt_tokens": given,
            "completion_tokens": self._tokens,
            "total_tokens": given + self._tokens,
        }


def _joined(choice: Json, part: Json) -> Json:
    """A choice, in place, with one more part of it."""
    choice["text"] += part["text"]
    choice["finish_reason"] = part["finish_reason"]
    choice["retrieved"] += part["retrieved"]
    for name, values in (part["logprobs"] or {}).items():
        choice["logprobs"][name] += values
    return choice


def _event(value: Json) -> bytes:
    return b"data: " + json_bytes(value) + b"\n\n"


def _check(generator: TextGenerator, body: CompletionRequest) -> None:
    if body.model not in (None, generator.name):
        raise NotFoundError(
            f"model: there is no {body.model!r} here, only {generator.name!r}",
            "model",
            "model_not_found",
        )
    if body.echo and body.logprobs is not None:
        raise InvalidRequestError(
            "logprobs: not implemented for the tokens of a prompt; leave echo or logprobs out",
            "logprobs",
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options: only with stream", "stream_options")


def _prompts(body: CompletionRequest) -> list[PromptInput]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    is_one = isinstance(prompt[0], int)
    return [prompt] if is_one else list(prompt)  # type: ignore[list-item]


def _configs(
    generator: TextGenerator, body: CompletionRequest, choices: int
) -> list[GenerateConfig]:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    seed = new_seed() if body.seed is None else body.seed
    neighbors = generator.default_neighbors if body.neighbors is None else body.neighbors
    return [
        GenerateConfig(
            max_new_tokens=body.max_tokens,
            min_new_tokens=body.min_tokens,
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            repetition_penalty=body.repetition_penalty,
            stop=stop,
            seed=(seed + i % body.n) % (_LAST_SEED + 1),
            logprobs=body.logprobs or 0,
            neighbors=neighbors,
            retrieval_interval=body.retrieval_interval,
            pad_tokens=body.pad_tokens,
        )
        for i in range(choices)
    ]
