"""NeMo's two routes with its requests and answers: `PUT /generate` of its text generation server
and `PUT /knn` of its retrieval services.

What NeMo's clients could ask for and is not served is refused, not ignored: see docs/serving.md.
"""

from itertools import accumulate
from typing import Any

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from model.decoding import TokenEvent
from model.generate_config import GenerateConfig
from serving.answers import GenerateAnswer
from serving.completions import Json, new_seed, shown_retrieval, wants_retrieval
from serving.disconnection import unless_client_leaves
from serving.documents import RetrievalDesk
from serving.engine import Job
from serving.errors import InvalidRequestError, json_response
from serving.generator import TextGenerator
from serving.schemas import (
    GenerateRequest,
    KnnAdd,
    KnnQuery,
    KnnRequest,
    KnnReset,
    KnnWeights,
)

_SUCCESS = "success"


def add_nemo_routes(app: FastAPI, generator: TextGenerator, options: Json) -> None:
    """
    Args:
        options: Of all routes.
    """
    desk = RetrievalDesk(generator)

    @app.put("/generate", **options, response_model=GenerateAnswer)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """NeMo's text generation."""
        retrieval = wants_retrieval(generator, None, body.neighbors)
        config = _config(generator, body)
        async with await generator.open(body.sentences, config, retrieval) as job:
            return json_response(await unless_client_leaves(request, _whole(generator, body, job)))

    @app.put("/knn", **options, response_model=list[Any] | str)
    async def knn(body: KnnRequest) -> Response:
        """NeMo's retrieval service: token ids of neighbors; additions, reset and weights."""
        if isinstance(body, KnnQuery):
            return json_response(await _neighbors(desk, body))
        if isinstance(body, KnnReset):
            await run_in_threadpool(desk.reset)
        elif isinstance(body, KnnWeights):
            _set_weights(desk, body)
        else:
            await run_in_threadpool(_add, desk, body)
        return json_response(_SUCCESS)


def _config(generator: TextGenerator, body: GenerateRequest) -> GenerateConfig:
    neighbors = generator.default_neighbors if body.neighbors is None else body.neighbors
    # NeMo takes top_p 0 for no limit, and looks at neither top_k nor top_p when it is greedy.
    drawing = {"temperature": body.temperature, "top_k": body.top_k, "top_p": body.top_p or 1.0}
    return GenerateConfig(
        **{} if body.greedy else drawing,
        max_new_tokens=body.tokens_to_generate,
        min_new_tokens=body.min_tokens_to_generate,
        repetition_penalty=body.repetition_penalty,
        stop=tuple(body.end_strings),
        seed=new_seed() if body.random_seed is None else body.random_seed,
        neighbors=neighbors,
    )


async def _whole(generator: TextGenerator, body: GenerateRequest, job: Job) -> Json:
    events: list[list[TokenEvent]] = [[] for _ in job.prompts]
    async for index, event in job.events():
        events[index].append(event)
    ids = [
        [*prompt.tokens, *(event.token for event in own)]
        for prompt, own in zip(job.prompts, events, strict=True)
    ]
    tokens = [[generator.token_text(token) for token in own] for own in ids]
    texts = ["".join(event.text for event in own) for own in events]
    return {
        "sentences": [given + text for given, text in zip(body.sentences, texts, strict=True)],
        "tokens": tokens,
        "token_ids": ids,
        "offsets": [[0, *accumulate(map(len, own[:-1]))] for own in tokens],
        "logprob": _logprobs(job, events) if body.compute_logprob else None,
        "retrieved": [
            [shown_retrieval(retrieval) for event in own for retrieval in event.retrievals]
            for own in events
        ],
    }


def _logprobs(job: Job, events: list[list[TokenEvent]]) -> list[list[float | None]]:
    """Of each token but the first; null for those of the prompt."""
    return [
        [None] * (len(prompt.tokens) - 1) + [event.logprob for event in own]
        for prompt, own in zip(job.prompts, events, strict=True)
    ]


async def _neighbors(desk: RetrievalDesk, body: KnnQuery) -> list[Any]:
    """[K, 2 chunk_size] token ids of one sentence, [N, K, 2 chunk_size] of a list."""
    is_one = isinstance(body.sentences, str)
    sentences = [body.sentences] if isinstance(body.sentences, str) else body.sentences
    found = await run_in_threadpool(desk.query, sentences, body.neighbors)
    tokens: list[Any] = found.tokens.tolist()
    return tokens[0] if is_one else tokens


def _set_weights(desk: RetrievalDesk, body: KnnWeights) -> None:
    names = list(desk.weights)
    if len(body.update_weight) != len(names):
        raise InvalidRequestError(
            f"update_weight: {len(body.update_weight)} weights, expected one for each of "
            f"{', '.join(names)}",
            "update_weight",
        )
    desk.set_weights(dict(zip(names, body.update_weight, strict=True)))


def _add(desk: RetrievalDesk, body: KnnAdd) -> None:
    if body.add_eos != desk.services.rules.append_eod:
        raise InvalidRequestError(
            f"add_eos: documents of this server are added with {desk.services.rules.append_eod}, "
            "as those of its retrieval dataset were",
            "add_eos",
        )
    key = desk.documents.config.text_key
    desk.add([{key: sentence} for sentence in body.sentences])
