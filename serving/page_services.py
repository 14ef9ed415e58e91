"""The page's panels of what there is to retrieve from: the weights of the services, and live
documents: which there are, adding some, removing all.

    text or JSON lines -> records -> RetrievalDesk.add
"""

import json
from typing import Any, Literal

import gradio as gr

from serving.documents import RetrievalDesk
from serving.errors import InvalidRequestError
from serving.generator import TextGenerator
from serving.live_documents import LiveConfig
from serving.page_markup import counted, draw_error, draw_status, escaped

Format = Literal["text", "JSON lines"]

_FORMATS = ("text", "JSON lines")
_SERVICES = {"static": "Index (static)", "dynamic": "Live documents (dynamic)"}
_LISTED = 200


def build_service_panels(page: gr.Blocks, generator: TextGenerator) -> None:
    """Those that there are, inside the block that is being laid out."""
    desk, services = RetrievalDesk(generator), generator.services
    if services is None:
        return
    if len(desk.weights) > 1:
        _build_weights(page, desk)
    if services.dynamic is not None:
        _build_documents(page, desk, services.dynamic.config)


def _build_weights(page: gr.Blocks, desk: RetrievalDesk) -> None:
    with gr.Accordion("Weights of the services", open=True):
        sliders = [
            gr.Slider(
                0, max(2.0, weight), weight, step=0.05, label=_SERVICES[name],
                info="0: not asked", elem_id=f"weight-{name}",
            )
            for name, weight in desk.weights.items()
        ]  # fmt: skip
        message = gr.HTML(elem_classes="rm-message")
    names = list(desk.weights)

    def set_weights(*weights: float) -> str:
        try:
            desk.set_weights(dict(zip(names, weights, strict=True)))
        except Exception as error:
            return draw_error(error)
        return draw_status("set, for everybody who generates from now on")

    for slider in sliders:
        slider.input(
            set_weights,
            sliders,
            message,
            trigger_mode="always_last",
            show_progress="hidden",
            api_visibility="private",
        )
    page.load(lambda: list(desk.weights.values()), None, sliders, api_visibility="private")


def _build_documents(page: gr.Blocks, desk: RetrievalDesk, config: LiveConfig) -> None:
    with gr.Accordion("Live documents", open=True):
        listed = gr.HTML(elem_id="documents")
        kind = gr.Radio(
            _FORMATS,
            value="text",
            label="Add",
            info=_explanation(config),
            elem_id="document-format",
        )
        text = gr.Textbox("", label="Document", lines=5, max_lines=12, elem_id="document-text")
        with gr.Row():
            source = gr.Textbox(
                "", label="Source", max_lines=1, min_width=120, elem_id="document-source"
            )
            title = gr.Textbox(
                "", label="Title", max_lines=1, min_width=120, elem_id="document-title"
            )
        with gr.Row():
            adding = gr.Button("Add", variant="primary", min_width=100, elem_id="add")
            asking = gr.Button("Reset", min_width=100, elem_id="reset")
        with gr.Row(visible=False) as question:
            confirming = gr.Button("Remove all", variant="stop", min_width=100, elem_id="confirm")
            keeping = gr.Button("Keep them", min_width=100, elem_id="keep")
        message = gr.HTML(elem_id="documents-message", elem_classes="rm-message")

    def add(kind: Format, text: str, source: str, title: str) -> tuple[str, str, Any]:
        try:
            ids = desk.add(parse_records(kind, text, source, title, config))
        except Exception as error:
            return draw_documents(desk), draw_error(error), gr.skip()
        return draw_documents(desk), draw_status(f"added: {len(ids)}"), ""

    def reset() -> tuple[str, str, Any]:
        try:
            desk.reset()
        except Exception as error:
            return draw_documents(desk), draw_error(error), gr.update(visible=False)
        return draw_documents(desk), draw_status("all removed"), gr.update(visible=False)

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    adding.click(
        add, [kind, text, source, title], [listed, message, text], api_visibility="private"
    )
    asking.click(lambda: gr.update(visible=True), None, question, **private)
    keeping.click(lambda: gr.update(visible=False), None, question, **private)
    confirming.click(reset, None, [listed, message, question], **private)
    page.load(lambda: draw_documents(desk), None, listed, **private)


def parse_records(
    kind: Format, text: str, source: str, title: str, config: LiveConfig
) -> list[dict[str, Any]]:
    """Records of what was typed in.

    Args:
        kind: "text": all of it is one document; "JSON lines": each line is a record.
        source: Of the records that name none.
        title: Likewise.
        config: Names of the fields.

    Raises:
        InvalidRequestError: nothing there, or a line that is no JSON object.
    """
    if not text.strip():
        raise InvalidRequestError("the document is empty; expected some text", "documents")
    named = {config.src_key: source.strip(), config.title_key: title.strip()}
    given = {key: value for key, value in named.items() if value}
    if kind == "text":
        return [{**given, config.text_key: text}]
    lines = enumerate(text.split("\n"), 1)
    return [{**given, **_parse_line(number, line)} for number, line in lines if line.strip()]


def _parse_line(number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InvalidRequestError(f"line {number} is no JSON: {error}", "documents") from None
    if not isinstance(record, dict):
        raise InvalidRequestError(
            f"line {number} is JSON, but no object; expected fields such as text", "documents"
        )
    return record


def draw_documents(desk: RetrievalDesk) -> str:
    """HTML of what there is, the latest first."""
    snapshot = desk.documents.pinned()
    count = len(snapshot.documents)
    shown = list(reversed(snapshot.documents[-_LISTED:]))
    items = [
        f"<li><span>{escaped(document.source)}</span>"
        f"<span>{counted(document.num_tokens, 'token')}</span></li>"
        for document in shown
    ]
    head = f"{counted(count, 'document')}, {counted(snapshot.num_chunks, 'chunk')}"
    if count > len(shown):
        head += f"; the latest {len(shown)}:"
    return f'<div class="rm-documents"><b>{head}</b><ul>{"".join(items)}</ul></div>'


def _explanation(config: LiveConfig) -> str:
    return (
        "Found by generations that start afterwards, whoever asks. Text: all of it is one "
        f'document. JSON lines: one object a line, its text in "{config.text_key}".'
    )
