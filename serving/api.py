"""The HTTP application over one `TextGenerator`: OpenAI's completions, retrieval and documents,
NeMo's routes, health and measures.

Call `create_app`; a page is mounted on what it returns.
"""

import time
from typing import Any

from fastapi import Depends, FastAPI, Security
from fastapi.security import HTTPBearer
from starlette.responses import Response

from serving.answers import ErrorAnswer, HealthAnswer, ModelsAnswer
from serving.completions import add_completion_route
from serving.documents import add_document_routes
from serving.errors import install_handlers, json_response
from serving.generator import TextGenerator
from serving.guard import HEALTH, AnswerCount, BodyLimit, Guard, require_json
from serving.nemo import add_nemo_routes
from serving.security import Credentials

_ERRORS = (400, 401, 404, 405, 413, 415, 421, 422, 429, 500, 503, 504)
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(
    generator: TextGenerator, credentials: Credentials | None = None, page_path: str | None = None
) -> FastAPI:
    """
    Args:
        generator: Its engine is started and closed by the caller.
        credentials: Without tokens only requests that ask for this machine are answered.
        page_path: Where a page will be mounted, with a login of its own, such as /ui: tokens are
            not asked for below it.
    """
    credentials = credentials or Credentials()
    app = FastAPI(title="retromill", docs_url=None, redoc_url=None)
    install_handlers(app)
    app.add_middleware(BodyLimit, max_body_bytes=generator.limits.max_body_bytes)
    app.add_middleware(Guard, credentials=credentials, page_path=page_path)
    app.add_middleware(AnswerCount, measures=generator.measures)
    guarded = [Security(HTTPBearer(auto_error=False))] if credentials.tokens else []
    responses: dict[int | str, Any] = {status: {"model": ErrorAnswer} for status in _ERRORS}
    reading = {"responses": responses, "dependencies": guarded}
    writing = {"responses": responses, "dependencies": [*guarded, Depends(require_json)]}
    add_completion_route(app, generator, writing)
    add_document_routes(app, generator, reading, writing)
    add_nemo_routes(app, generator, writing)
    _add_status_routes(app, generator, reading)
    return app


def _add_status_routes(app: FastAPI, generator: TextGenerator, options: dict[str, Any]) -> None:
    started = int(time.time())

    @app.get("/v1/models", **options, response_model=ModelsAnswer)
    async def models() -> Response:
        """The model that is served."""
        about = {"object": "model", "created": started, "owned_by": "retromill"}
        return json_response({"object": "list", "data": [{"id": generator.name, **about}]})

    @app.get(HEALTH, responses=options["responses"], response_model=HealthAnswer)
    async def health() -> Response:
        """Whether requests are taken: 200 or 503."""
        is_well = generator.engine.is_serving
        status = {"status": "ok" if is_well else "not serving"}
        return json_response(status, 200 if is_well else 503)

    text = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    responses = {**options["responses"], **text}

    @app.get("/metrics", **{**options, "responses": responses}, response_class=Response)
    async def metrics() -> Response:
        """Counts and times, in Prometheus' text format."""
        return Response(generator.measures.text(), media_type=_METRICS_TYPE)
