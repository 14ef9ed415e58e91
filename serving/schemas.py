"""Bodies of requests, strict: what is not named is refused, and no value is converted.

Limits that a server can set are checked later (`serving/limits.py`).
"""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag


class Strict(BaseModel):
    """Of all requests."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _not_tiny(value: float) -> float:
    if 0 < value < 0.01:
        raise ValueError("expected 0, or 0.01 to 100")
    return value


def _zero(value: float) -> float:
    if value != 0:
        raise ValueError("penalties by frequency are not implemented; use repetition_penalty")
    return value


def _off(value: bool) -> bool:
    if value:
        raise ValueError("not implemented; leave it out")
    return value


def _nothing(value: None) -> None:
    if value is not None:
        raise ValueError("not implemented; leave it out")
    return value


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
Temperature = Annotated[float, Field(ge=0, le=100), AfterValidator(_not_tiny)]
TopP = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=0.1, le=10)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Count = Annotated[int, Field(ge=0)]
Off = Annotated[bool, AfterValidator(_off), Field(json_schema_extra={"enum": [False]})]
Unserved = Annotated[float, AfterValidator(_zero), Field(json_schema_extra={"enum": [0]})]


class StreamOptions(Strict):
    """How a stream is answered: `include_usage` adds a last chunk with the usage."""

    include_usage: bool = False


class CompletionRequest(Strict):
    """OpenAI's completion request, and what RETRO adds to it."""

    model: str | None = Field(None, description="as /v1/models names it")
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    max_tokens: int = Field(16, ge=1)
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    n: int = Field(
        1, ge=1, description="continuations of each prompt, with seeds seed, seed+1, ..."
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: Count | None = Field(None, description="most likely tokens to report for each token")
    echo: bool = False
    stop: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    seed: Seed | None = Field(None, description="drawn if there is none")
    suffix: Annotated[None, AfterValidator(_nothing)] = None
    presence_penalty: Unserved = 0.0
    frequency_penalty: Unserved = 0.0
    top_k: Count = 0
    repetition_penalty: Penalty = 1.0
    min_tokens: Count = 0
    retrieval: bool | None = Field(None, description="by default on where there is something")
    retrieval_interval: int = Field(1, ge=1, description="retrieve for chunks 0, n, 2n, ...")
    neighbors: Count | None = Field(None, description="of each chunk; 0 turns retrieval off")
    pad_tokens: bool = Field(
        False, description="fill the prompt's first chunk up, so that it is retrieved for at once"
    )


class RetrieveText(Strict):
    """Neighbors of one text."""

    text: Text
    neighbors: int | None = Field(None, ge=1)


class RetrieveTexts(Strict):
    """Neighbors of each text."""

    texts: list[Text] = Field(min_length=1)
    neighbors: int | None = Field(None, ge=1)


class AddDocuments(Strict):
    """Documents as preparation takes them: the text in `text`, anything else beside it."""

    documents: list[dict[str, Any]] = Field(min_length=1)


class SetWeights(Strict):
    """Weights by name of the service; the others keep theirs."""

    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1)


class GenerateRequest(Strict):
    """NeMo's PUT /generate, with its defaults."""

    sentences: list[Text] = Field(min_length=1)
    tokens_to_generate: int = Field(64, ge=1)
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    top_k: Count = 0
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.9
    greedy: bool = False
    repetition_penalty: Annotated[float, Field(ge=1, le=10)] = 1.2
    min_tokens_to_generate: Count = 0
    end_strings: list[Text] = ["<|endoftext|>"]
    neighbors: Count | None = None
    random_seed: Seed | None = None
    compute_logprob: bool = False
    all_probs: Off = False
    add_BOS: Off = False
    task_ids: Annotated[None, AfterValidator(_nothing)] = None


class KnnQuery(Strict):
    """Tokens of the neighbors of sentences."""

    sentences: Text | Annotated[list[Text], Field(min_length=1)]
    neighbors: int = Field(ge=1)


class KnnAdd(Strict):
    """Sentences that become documents."""

    sentences: list[Text] = Field(min_length=1)
    add_eos: bool = True


class KnnReset(Strict):
    """Removes what was added."""

    reset: None


class KnnWeights(Strict):
    """Weights in the order of the services: static, dynamic."""

    update_weight: list[Annotated[float, Field(ge=0)]] = Field(min_length=1)


def _kind(body: Any) -> str:
    """By the key that NeMo tells requests apart by."""
    keys = {"neighbors": "query", "reset": "reset", "update_weight": "update_weight"}
    return next(
        (kind for key, kind in keys.items() if isinstance(body, dict) and key in body), "add"
    )


KnnRequest = Annotated[
    Annotated[KnnQuery, Tag("query")]
    | Annotated[KnnReset, Tag("reset")]
    | Annotated[KnnWeights, Tag("update_weight")]
    | Annotated[KnnAdd, Tag("add")],
    Discriminator(_kind),
]
