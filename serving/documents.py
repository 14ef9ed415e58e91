"""Routes of retrieval without generation: `/v1/retrieve`, `/v1/documents`, `/v1/retrieval/weights`.

The services block, so they are called in the thread pool.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Query
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from etl.storage import StorageError
from model.retriever import Neighbor, Neighbors
from serving.answers import (
    AddedAnswer,
    DocumentCounts,
    DocumentsAnswer,
    RetrieveAnswer,
    WeightsAnswer,
)
from serving.errors import (
    InvalidRequestError,
    NotFoundError,
    RetrievalUnavailableError,
    StorageUnavailableError,
    TooLargeError,
    json_response,
)
from serving.generator import TextGenerator
from serving.live_documents import LimitError, LiveDocuments
from serving.live_snapshot import LiveDocument
from serving.schemas import AddDocuments, RetrieveText, RetrieveTexts, SetWeights
from serving.services import RetrievalServices

log = logging.getLogger(__name__)

_LARGEST_ID = (1 << 53) - 1
_LARGEST_PAGE = 1000


class RetrievalDesk:
    """The services of a server, with its limits and its errors. All methods but the properties
    block."""

    def __init__(self, generator: TextGenerator) -> None:
        self._generator = generator

    @property
    def services(self) -> RetrievalServices:
        """
        Raises:
            NotFoundError: the server has none.
        """
        services = self._generator.services
        if services is None:
            raise NotFoundError("this server has no retrieval services", None, "no_retrieval")
        return services

    @property
    def documents(self) -> LiveDocuments:
        """
        Raises:
            NotFoundError: the server takes none.
        """
        if self.services.dynamic is None:
            raise NotFoundError(
                "this server takes no documents; its operator would have to start it with "
                "retrieval.live",
                None,
                "no_live_documents",
            )
        return self.services.dynamic

    @property
    def weights(self) -> dict[str, float]:
        return self.services.combined.weights

    def query(self, texts: Sequence[str], neighbors: int | None) -> Neighbors:
        """
        Raises:
            InvalidRequestError, TooLargeError: above a limit.
            RetrievalUnavailableError: a service failed.
        """
        count = self._generator.default_neighbors if neighbors is None else neighbors
        self._generator.limits.check_texts(texts, count)
        combined = self.services.combined
        try:
            return combined.query(texts, count)
        except Exception as error:
            log.error("retrieval failed", exc_info=error)
            raise RetrievalUnavailableError("a retrieval service failed; try again") from error

    def add(self, records: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """
        Raises:
            InvalidRequestError: a record that is no document.
            TooLargeError: above a limit.
            StorageUnavailableError: they cannot be saved.
        """
        documents = self.documents
        self._generator.limits.check_documents([len(json.dumps(record)) for record in records])
        try:
            return documents.add(records)
        except (StorageError, OSError) as error:
            raise _not_saved(error) from error
        except LimitError as error:
            raise TooLargeError(str(error), "documents", "too_many_documents") from error
        except ValueError as error:
            raise InvalidRequestError(str(error), "documents") from error

    def reset(self) -> None:
        """
        Raises:
            StorageUnavailableError: it cannot be saved; the documents stay.
        """
        try:
            self.documents.reset()
        except (StorageError, OSError) as error:
            raise _not_saved(error) from error

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """
        Raises:
            InvalidRequestError: an unknown service.
        """
        try:
            self.services.combined.set_weights(weights)
        except ValueError as error:
            raise InvalidRequestError(str(error), "weights") from error


def add_document_routes(
    app: FastAPI, generator: TextGenerator, reading: dict[str, Any], writing: dict[str, Any]
) -> None:
    """
    Args:
        reading: Options of routes without a body.
        writing: Options of routes with one.
    """
    desk = RetrievalDesk(generator)

    @app.post("/v1/retrieve", **writing, response_model=RetrieveAnswer)
    async def retrieve(body: RetrieveText | RetrieveTexts) -> Response:
        """Neighbors of texts, each embedded as it is."""
        texts = [body.text] if isinstance(body, RetrieveText) else body.texts
        found = await run_in_threadpool(desk.query, texts, body.neighbors)
        return json_response({"results": [[_neighbor(n) for n in own] for own in found.found]})

    @app.post("/v1/documents", **writing, response_model=AddedAnswer)
    async def add(body: AddDocuments) -> Response:
        """Adds documents, all or none; from the answer on they are found, and saved."""
        ids = await run_in_threadpool(desk.add, body.documents)
        return json_response({"ids": ids, **_counts(desk.documents)})

    @app.delete("/v1/documents", **reading, response_model=DocumentCounts)
    async def reset() -> Response:
        """Removes all documents."""
        await run_in_threadpool(desk.reset)
        return json_response(_counts(desk.documents))

    @app.get("/v1/documents", **reading, response_model=DocumentsAnswer)
    async def page(
        start: Annotated[int, Query(ge=0, le=_LARGEST_ID)] = 0,
        count: Annotated[int, Query(ge=1, le=_LARGEST_PAGE)] = 100,
    ) -> Response:
        """Documents from id `start` on."""
        found = [_document(document) for document in desk.documents.list(start, count)]
        return json_response({"documents": found, **_counts(desk.documents)})

    @app.get("/v1/retrieval/weights", **reading, response_model=WeightsAnswer)
    async def weights() -> Response:
        """Weights of the services."""
        return json_response({"weights": desk.weights})

    @app.put("/v1/retrieval/weights", **writing, response_model=WeightsAnswer)
    async def set_weights(body: SetWeights) -> Response:
        """Sets some of them; requests in progress keep theirs."""
        desk.set_weights(body.weights)
        return json_response({"weights": desk.weights})


def _neighbor(neighbor: Neighbor) -> dict[str, Any]:
    return dict(vars(neighbor))


def _document(document: LiveDocument) -> dict[str, Any]:
    return {
        "id": document.id,
        "text": document.text,
        "name": document.name,
        "source": document.source,
        "metadata": dict(document.metadata),
        "num_tokens": document.num_tokens,
        "num_chunks": document.num_chunks,
    }


def _counts(documents: LiveDocuments) -> dict[str, int]:
    snapshot = documents.pinned()
    return {
        "num_documents": len(snapshot.documents),
        "num_chunks": snapshot.num_chunks,
        "generation": snapshot.generation,
    }


def _not_saved(error: Exception) -> StorageUnavailableError:
    log.error("documents could not be saved", exc_info=error)
    return StorageUnavailableError("documents could not be saved; the server's log says why")
