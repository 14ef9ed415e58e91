"""The web page: a prompt, everything that can be asked of generation, live documents, and the text
as it is generated with the neighbors beside it.

In the process of the API, over the same `TextGenerator`; mounted on its application.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import gradio as gr
from fastapi import Depends, FastAPI, HTTPException, Request
from gradio.components import Component
from gradio.routes import App
from starlette.responses import Response
from starlette.routing import Mount

from model.generate_config import GenerateConfig
from serving.engine import Job
from serving.generator import TextGenerator
from serving.guard import FAVICON, MANIFEST
from serving.page_markup import draw_error, draw_status, escaped
from serving.page_options import build_retrieval_options, build_sampling_options, make_options
from serving.page_services import build_service_panels
from serving.page_style import CSS, page_theme
from serving.page_transcript import Transcript
from serving.security import Credentials

_SHORTEST_WAIT_S = 0.05
_ROOT_FILES = {
    MANIFEST: lambda _: Response('{"name": "retromill"}', media_type="application/manifest+json"),
    FAVICON: lambda _: Response(status_code=204),
}
_LOGIN_ROUTES = {
    "/",
    "/login",
    "/login/",
    "/theme.css",
    "/assets/{path:path}",
    "/static/{path:path}",
}
_REASONS = {
    "eod": "end of the document",
    "stop": "a stop string",
    "length": "as many tokens as asked for",
}


def mount_page(
    app: FastAPI, generator: TextGenerator, path: str, credentials: Credentials
) -> Callable[[], None]:
    """Adds the page at a path, behind its login if there is one.

    Args:
        app: Of `create_app`, which was told the path.

    Returns:
        To be called in the server's loop when it stops: ends the connection that every opened page
        keeps.
    """
    is_guarded = credentials.page_login is not None
    for file, answer in _ROOT_FILES.items():
        app.add_route(file, answer, include_in_schema=False)
    gr.mount_gradio_app(
        app,
        build_page(generator),
        path,
        auth=credentials.page_login,
        app_kwargs={
            "dependencies": [Depends(_require_login)] if is_guarded else [],
            "openapi_url": None,
        },
        theme=page_theme(),
        css=CSS,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=1,
    )
    [page] = [route.app for route in app.routes if isinstance(route, Mount) and route.path == path]
    assert isinstance(page, App)
    return page.stop_event.set


def _require_login(request: Request) -> None:
    """gradio asks for the login at some of its routes only, so it is asked for at all but those of
    the login form.

    Raises:
        HTTPException: nobody has logged in.
    """
    page = request.app
    names = (f"access-token-{page.cookie_id}", f"access-token-unsecure-{page.cookie_id}")
    is_known = any(request.cookies.get(name) in page.tokens for name in names)
    if not is_known and request.scope["route"].path not in _LOGIN_ROUTES:
        raise HTTPException(401, "log in first")


def build_page(generator: TextGenerator) -> gr.Blocks:
    """The page, not mounted. Nothing of it reports to anybody."""
    title = f"{generator.name} - retromill"
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gr.HTML(_draw_title(generator))
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                prompt = gr.Textbox(
                    "",
                    label="Prompt",
                    placeholder="A text to continue",
                    lines=6,
                    max_lines=16,
                    elem_id="prompt",
                )
                with gr.Row():
                    start = gr.Button(
                        "Generate", variant="primary", min_width=100, elem_id="generate"
                    )
                    stop = gr.Button("Stop", min_width=100, elem_id="stop")
                status = gr.HTML(elem_id="status", elem_classes="rm-message")
                transcript = gr.HTML(elem_id="transcript")
            with gr.Column(scale=3, min_width=320):
                controls = build_retrieval_options(generator)
                build_service_panels(page, generator)
                controls |= build_sampling_options(generator)
        _connect(generator, prompt, controls, (start, stop), [transcript, status])
    return page.queue(
        api_open=False, max_size=generator.limits.max_queued, default_concurrency_limit=None
    )


def _connect(
    generator: TextGenerator,
    prompt: Component,
    controls: dict[str, Component],
    buttons: tuple[gr.Button, gr.Button],
    outputs: list[Component],
) -> None:
    generation = Generation(generator, tuple(controls))
    start, stop = buttons
    start.click(
        generation.stream,
        [prompt, *controls.values()],
        outputs,
        show_progress="hidden",
        api_visibility="private",
    )
    stop.click(generation.stop, None, None, show_progress="hidden", api_visibility="private")


class Generation:
    """What the page calls to generate: HTML of the transcript and of the status, whenever there is
    something new to see. Whoever leaves ends the generation.

    Args:
        names: Of the controls whose values follow the prompt.
    """

    def __init__(self, generator: TextGenerator, names: Sequence[str]) -> None:
        self._generator, self._names = generator, names
        self._jobs: dict[str | None, Job] = {}

    async def stream(
        self, request: gr.Request, prompt: str, *values: Any
    ) -> AsyncIterator[tuple[Any, str]]:
        try:
            options = make_options(dict(zip(self._names, values, strict=True)))
            yield "", draw_status("waiting for a free slot")
            opened = self._generator.open([prompt], options.config, options.retrieval)
            async with await opened as job:
                self._jobs[request.session_hash] = job
                async for shown in self._shown(job, options.config):
                    yield shown
        except Exception as error:
            yield gr.skip(), draw_error(error)
        finally:
            self._jobs.pop(request.session_hash, None)

    async def stop(self, request: gr.Request) -> None:
        """Ends what the same opened page has in progress; its slot is free at the next step."""
        job = self._jobs.get(request.session_hash)
        if job is not None:
            job.stop()

    async def _shown(self, job: Job, config: GenerateConfig) -> AsyncIterator[tuple[str, str]]:
        transcript, shown_at = self._transcript(job), 0.0
        seed = f"; seed {config.seed}" if config.temperature > 0 else ""
        async for _, event in job.events():
            transcript.add(event)
            if time.monotonic() - shown_at >= _SHORTEST_WAIT_S:
                yield transcript.html(), draw_status(f"{transcript.summary} so far{seed}")
                shown_at = time.monotonic()
        reason = transcript.finish_reason
        end = "stopped" if reason is None else f"done: {_REASONS[reason]}"
        yield transcript.html(), draw_status(f"{transcript.summary}; {end}{seed}")

    def _transcript(self, job: Job) -> Transcript:
        services = self._generator.services
        chunk_size = None if services is None else services.rules.chunk_size
        return Transcript(self._generator.tokenizer, job.prompts[0].tokens, chunk_size)


def _draw_title(generator: TextGenerator) -> str:
    return f'<div class="rm-title"><h1>{escaped(generator.name)}</h1><span>retromill</span></div>'
