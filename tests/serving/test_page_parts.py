"""What the page is made of, without a browser: pieces of a text, options, records."""

import asyncio
import re
from dataclasses import fields
from html import unescape
from itertools import pairwise

import gradio as gr
import pytest

from model.generate_config import GenerateConfig, GenerationError
from serving.errors import InvalidRequestError
from serving.live_documents import LiveConfig
from serving.page import Generation, build_page
from serving.page_markup import draw_status
from serving.page_options import make_options
from serving.page_services import parse_records
from serving.page_transcript import Transcript, marked
from tests.serving.served import LONG, make_generator, running
from tests.small_data import CHUNK_SIZE

VALUES = {
    "max_new_tokens": 40,
    "min_new_tokens": 0,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "stop": "",
    "seed": "5",
}
RETRIEVAL = {"retrieval": True, "neighbors": 2, "retrieval_interval": 1, "pad_tokens": True}


@pytest.fixture(scope="module")
def generator(tokenizer_url):
    with running(make_generator(tokenizer_url)) as made:
        yield made


def events_of(generator, prompt, config, retrieval=True):
    """Token ids of the prompt, and the events."""

    async def collect():
        async with await generator.open([prompt], config, retrieval) as job:
            return job.prompts[0].tokens, [event async for _, event in job.events()]

    return asyncio.run(collect())


def owner(retrievals, position):
    """Position of the retrieval that takes part in the prediction of a token."""
    reaching = [p for p in retrievals if p < position <= p + CHUNK_SIZE]
    return max(reaching, default=None)


@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("prompt", ["the", LONG[:60], LONG])
def test_each_token_stands_beside_what_was_retrieved_for_it(generator, prompt, pads, interval):
    config = GenerateConfig(70, retrieval_interval=interval, pad_tokens=pads, temperature=1, seed=3)
    tokens, events = events_of(generator, prompt, config)
    transcript = Transcript(generator.tokenizer, tokens, CHUNK_SIZE)
    for event in events:
        transcript.add(event)
    retrievals = [found.position for event in events for found in event.retrievals]
    assert len(retrievals) > 1
    expected, texts = {}, [generator.decode([token]) for token in tokens]
    for i, text in enumerate([*texts, *(event.text for event in events)]):
        key = (owner(retrievals, i), i < len(tokens))
        expected[key] = expected.get(key, "") + text
    found = {}
    for piece in transcript.pieces:
        position = piece.retrieval and piece.retrieval.position
        for key, text in (((position, True), piece.prompt), ((position, False), piece.generated)):
            found[key] = found.get(key, "") + text
    assert {k: v for k, v in found.items() if v} == {k: v for k, v in expected.items() if v}
    positions = [piece.retrieval.position for piece in transcript.pieces if piece.retrieval]
    assert positions == retrievals
    assert all(a < b for a, b in pairwise(positions))


def test_pieces_of_whole_characters_even_where_tokens_are_not(generator):
    text = "é€𝄞 " * 12
    tokens, events = events_of(generator, text, GenerateConfig(1))
    transcript = Transcript(generator.tokenizer, tokens, CHUNK_SIZE)
    transcript.add(events[0])
    assert len(transcript.pieces) > 2
    assert "".join(piece.prompt for piece in transcript.pieces) == text


def test_what_is_drawn_step_by_step_is_what_is_drawn_at_once(generator):
    tokens, events = events_of(generator, LONG, GenerateConfig(60))
    steps, whole = (Transcript(generator.tokenizer, tokens, CHUNK_SIZE) for _ in range(2))
    for event in events:
        whole.add(event)
        steps.add(event)
        drawn = steps.html()
    assert drawn == whole.html()


@pytest.mark.parametrize(
    ("text", "others", "inside"),
    [
        ("a light of the old town", ["the light, of THE old mill"], "light of the old"),
        ("one two three", ["one two"], None),
        ("one two three", [], None),
        ("", ["one two three"], None),
        ("x <b>one two</b> three & y", ["ONE two <i> b three", "two b three"], "two</b> three"),
        ("one two three four", ["one two three", "two three four five one two three four"], "*"),
    ],
)
def test_longest_common_run_of_words_is_marked(text, others, inside):
    html = marked(text, others)
    runs = [unescape(run) for run in re.findall("<mark>(.*?)</mark>", html)]
    assert runs == ([] if inside is None else [text if inside == "*" else inside])
    assert unescape(re.sub("</?mark>", "", html)) == text
    assert "<b>" not in html


def test_every_option_of_generation_has_a_control(generator):
    page = build_page(generator)
    names = {name for name in VALUES | RETRIEVAL if name != "retrieval"}
    assert names == {field.name for field in fields(GenerateConfig)} - {"logprobs"}
    [call] = [fn for fn in page.fns.values() if getattr(fn.fn, "__name__", "") == "stream"]
    owner = call.fn.__self__
    assert set(owner._names) == names | {"retrieval"}
    shown = dict(zip(owner._names, [part.value for part in call.inputs[1:]], strict=True))
    defaults = GenerateConfig(seed=1, pad_tokens=True)
    assert shown["seed"] == ""
    assert make_options(shown | {"seed": "1"}).config == defaults


def test_values_become_options():
    given = {"stop": "one\n\ntwo\\nlines", "temperature": 0.5, "top_k": 3, "top_p": 0.9}
    made = make_options(VALUES | RETRIEVAL | given)
    expected = GenerateConfig(
        40, 0, 0.5, 3, 0.9, stop=("one", "two\nlines"), seed=5, neighbors=2, pad_tokens=True
    )
    assert (made.config, made.retrieval) == (expected, True)
    off = make_options(VALUES | RETRIEVAL | {"retrieval": False})
    assert (off.config.neighbors, off.retrieval) == (0, False)
    plain = make_options(VALUES)
    assert (plain.config.neighbors, plain.retrieval) == (0, False)
    seeds = {make_options(VALUES | {"seed": " "}).config.seed for _ in range(4)}
    assert len(seeds) == 4
    with pytest.raises(InvalidRequestError, match="top_p is empty"):
        make_options(VALUES | {"top_p": None})
    for seed in ("-1", "x", "1.5", "9" * 40, "\u0663"):
        with pytest.raises(InvalidRequestError, match="seed is"):
            make_options(VALUES | {"seed": seed})
    with pytest.raises(GenerationError, match="no effect at temperature 0"):
        make_options(VALUES | {"top_k": 3})


def test_typed_documents_become_records():
    config = LiveConfig(text_key="body", src_key="from")
    text = ' two\n{"body": 1} '
    assert parse_records("text", text, " s ", "", config) == [{"body": text, "from": "s"}]
    lines = '{"body": "a", "from": "own"}\r\n\n {"body": "b", "title": "T", "n": [1]}'
    assert parse_records("JSON lines", lines, "s", "given", config) == [
        {"body": "a", "from": "own", "title": "given"},
        {"body": "b", "from": "s", "title": "T", "n": [1]},
    ]
    for kind, bad, why in [
        ("text", " \n", "empty"),
        ("JSON lines", "", "empty"),
        ("JSON lines", '{"body": "a"}\n{"body": ', "line 2 is no JSON"),
        ("JSON lines", "\n[1]", "line 2 is JSON, but no object"),
    ]:
        with pytest.raises(InvalidRequestError, match=why):
            parse_records(kind, bad, "", "", config)


def test_a_server_that_ends_is_told(tokenizer_url):
    """Its engine does not run."""
    request = gr.Request(session_hash="own")
    generation = Generation(make_generator(tokenizer_url, services=None), list(VALUES))

    async def shown():
        return [html async for _, html in generation.stream(request, "x", *VALUES.values())]

    assert 'role="alert"' in asyncio.run(shown())[-1]


def test_what_is_no_unicode_can_be_sent():
    assert draw_status("a\ud800<").encode().endswith(b"a?&lt;</div>")
