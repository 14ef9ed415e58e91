"""The page's controls of generation, and the `GenerateConfig` that their values make.

Which controls there are depends on the server: without retrieval services none of retrieval.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from model.generate_config import GenerateConfig
from serving.errors import InvalidRequestError
from serving.generator import TextGenerator

_RANDOM_SEEDS = 1 << 31
_LONGEST_SEED = 20
_STOP_HELP = "One a line; \\n in it stands for a line break. They are not part of the text."


@dataclass(frozen=True)
class Options:
    """What was set.

    Attributes:
        config: Its seed was drawn if none was given.
        retrieval: Whether to retrieve.
    """

    config: GenerateConfig
    retrieval: bool


def build_retrieval_options(generator: TextGenerator) -> dict[str, Component]:
    """The controls by field of `GenerateConfig`, and `retrieval`, inside the block that is being
    laid out."""
    if generator.services is None or generator.limits.max_neighbors == 0:
        return {}
    default, most = GenerateConfig(), generator.limits.max_neighbors
    with gr.Accordion("Retrieval", open=True):
        switch = gr.Checkbox(True, label="Retrieve neighbors", elem_id="retrieval")
        with gr.Column(visible=True) as group:
            with gr.Row():
                neighbors = _number(
                    "Neighbors",
                    generator.default_neighbors,
                    f"of a chunk, up to {most}",
                    "neighbors",
                )
                interval = _number("Interval", default.retrieval_interval, "in chunks")
            pads = gr.Checkbox(
                True, label="Pad the prompt", info="A short one is retrieved for at once."
            )
    switch.change(lambda on: gr.update(visible=on), switch, group, api_visibility="private")
    return {
        "retrieval": switch,
        "neighbors": neighbors,
        "retrieval_interval": interval,
        "pad_tokens": pads,
    }


def build_sampling_options(generator: TextGenerator) -> dict[str, Component]:
    """The other controls, likewise."""
    limits, default = generator.limits, GenerateConfig()
    tokens = min(default.max_new_tokens, limits.max_new_tokens)
    controls: dict[str, Component] = {}
    with gr.Accordion("Generation", open=True):
        with gr.Row():
            controls["max_new_tokens"] = _number(
                "Max new tokens", tokens, f"up to {limits.max_new_tokens}", "max-new-tokens"
            )
            controls["min_new_tokens"] = _number(
                "Min new tokens", default.min_new_tokens, "no end before them"
            )
        with gr.Row():
            controls["temperature"] = gr.Slider(
                0, 2, default.temperature, step=0.05, label="Temperature", info="0: no draws",
                min_width=160, elem_id="temperature",
            )  # fmt: skip
            controls["repetition_penalty"] = gr.Slider(
                0.5, 2, default.repetition_penalty, step=0.05, label="Repetition penalty",
                info="above 1: fewer repeats", min_width=160,
            )  # fmt: skip
        with gr.Row():
            controls["top_k"] = _number("Top k", default.top_k, "0: all tokens")
            controls["top_p"] = _number("Top p", default.top_p, "1: all tokens", precision=None)
            controls["seed"] = gr.Textbox(
                "", label="Seed", info="empty: drawn", max_lines=1, min_width=100, elem_id="seed"
            )
        controls["stop"] = gr.Textbox(
            "", label="Stop strings", info=_STOP_HELP, lines=2, max_lines=6, elem_id="stop-strings"
        )
    return controls


def make_options(values: Mapping[str, Any]) -> Options:
    """
    Args:
        values: Of the controls, by name.

    Raises:
        InvalidRequestError: a number is missing, or the seed is none.
        GenerationError: values out of range.
    """
    fields = dict(values)
    retrieval = bool(fields.pop("retrieval", False))
    fields["seed"] = _seed(fields["seed"].strip())
    if not retrieval:
        fields["neighbors"] = 0
    for name, value in fields.items():
        if value is None:
            raise InvalidRequestError(f"{name} is empty; expected a number", name)
    lines = [line.replace("\\n", "\n") for line in fields["stop"].split("\n") if line]
    return Options(GenerateConfig(**{**fields, "stop": tuple(lines)}), retrieval)


def _seed(text: str) -> int:
    if not text:
        return secrets.randbelow(_RANDOM_SEEDS)
    if not (text.isascii() and text.isdecimal() and len(text) < _LONGEST_SEED):
        raise InvalidRequestError(
            f"seed is {text[:_LONGEST_SEED]!r}; expected a whole number, or nothing", "seed"
        )
    return int(text)


def _number(
    label: str, value: float | None, info: str, name: str | None = None, precision: int | None = 0
) -> gr.Number:
    return gr.Number(
        value, label=label, info=info, precision=precision, min_width=100, elem_id=name,
        step=1 if precision == 0 else 0.05,
    )  # fmt: skip
