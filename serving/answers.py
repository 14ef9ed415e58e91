"""Bodies of answers, for the OpenAPI schema; the routes write them as plain JSON."""

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The one form of errors."""

    error: ErrorDetail


class NeighborAnswer(BaseModel):
    """A chunk with its continuation; `id` is its chunk id in its service."""

    text: str
    source: str
    score: float
    service: str
    id: int


class RetrievalAnswer(BaseModel):
    """Neighbors that take part in predictions from token `position` of prompt and text on."""

    position: int
    neighbors: list[NeighborAnswer]


class Logprobs(BaseModel):
    """OpenAI's, of the model's own distribution."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Choice(BaseModel):
    """A continuation."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: Logprobs | None
    retrieved: list[RetrievalAnswer]


class Usage(BaseModel):
    """Tokens, over all choices; those of a prompt once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionAnswer(BaseModel):
    """OpenAI's, with `retrieved` in each choice."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ModelAnswer(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsAnswer(BaseModel):
    """All of them: one."""

    object: Literal["list"]
    data: list[ModelAnswer]


class RetrieveAnswer(BaseModel):
    """Neighbors of each text, best first."""

    results: list[list[NeighborAnswer]]


class DocumentAnswer(BaseModel):
    """A live document."""

    id: int
    text: str
    name: str | None
    source: str
    metadata: dict[str, Any]
    num_tokens: int
    num_chunks: int


class DocumentCounts(BaseModel):
    """How many there are now; `generation` rises with every change."""

    num_documents: int
    num_chunks: int
    generation: int


class AddedAnswer(DocumentCounts):
    """Ids in the order of the documents; a text that is there already has the id it had."""

    ids: list[int]


class DocumentsAnswer(DocumentCounts):
    """A page of them, by id."""

    documents: list[DocumentAnswer]


class WeightsAnswer(BaseModel):
    """By name of the service."""

    weights: dict[str, float]


class GenerateAnswer(BaseModel):
    """NeMo's."""

    sentences: list[str]
    tokens: list[list[str]]
    token_ids: list[list[int]]
    offsets: list[list[int]]
    logprob: list[list[float | None]] | None
    retrieved: list[list[RetrievalAnswer]]


class HealthAnswer(BaseModel):
    """`ok`, or why not."""

    status: str
