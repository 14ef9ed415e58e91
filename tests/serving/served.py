"""A served model of random weights: an application, and a real server around it on loopback.

Double precision, so that what a sequence becomes does not depend on which others are computed with
it, not even by rounding.
"""

import asyncio
import json
import socket
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache

import httpx
import numpy as np
import torch
import uvicorn

from etl.retmmap import Layout
from etl.tokenizer import load_tokenizer
from model.config import RetroConfig
from model.decoding import Decoder
from model.initialization import initialize
from model.retro import Retro
from serving.api import create_app
from serving.chunk_rules import ChunkRules
from serving.combined import CombinedRetriever
from serving.engine import Engine
from serving.generator import TextGenerator
from serving.limits import Limits
from serving.live_documents import LiveConfig, LiveDocuments
from serving.measures import Measures
from serving.services import RetrievalServices
from tests.serving.word_embedder import WordEmbedder
from tests.small_data import CHUNK_SIZE

LIMITS = Limits(
    max_sequences=8,
    max_queued=64,
    max_choices=8,
    max_prompt_tokens=200,
    max_new_tokens=100,
    max_neighbors=3,
    max_body_bytes=100_000,
    max_documents=50,
    max_document_characters=5000,
    max_texts=8,
    max_text_characters=500,
    timeout_s=60.0,
    grace_s=5.0,
)
DOCUMENTS = [
    {"text": "the harbor light of the old town turns slowly over the water", "id": "harbor"},
    {"text": "counting the stars is a work of patience and of warm coats", "title": "Stars"},
    {"text": "a letter from the north came with the morning boat", "src": "letters", "n": 1},
]
LONG = "the harbor light of the old town turns slowly over the water " * 2


def tiny_model(tokenizer, **changes):
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "dec_num_layers": 3,
        "dec_cross_attention": (1,),
        "enc_num_layers": 1,
        "enc_cross_attention": (0,),
        "init_method_std": 0.3,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "chunk_size": CHUNK_SIZE,
    }
    model = Retro(RetroConfig(**(shape | changes))).double()
    initialize(model, 0)
    return model.eval()


def live_services(tokenizer, config=None, embedder=None):
    rules = ChunkRules(tokenizer, Layout.of(CHUNK_SIZE, np.uint16, True))
    live = LiveDocuments(rules, embedder or WordEmbedder(), config or LiveConfig(max_documents=100))
    return RetrievalServices(None, live, CombinedRetriever({"dynamic": live}))


def make_generator(tokenizer_url, limits=LIMITS, services=..., decoder=None, **changes):
    """Its engine is not started. `decoder` makes another decoder of the ordinary one."""
    tokenizer = load_tokenizer(tokenizer_url)
    model = tiny_model(tokenizer, **changes)
    if services is ...:
        services = live_services(tokenizer)
        services.dynamic.add(DOCUMENTS)
    length = CHUNK_SIZE + limits.max_prompt_tokens + limits.max_new_tokens
    neighbors = limits.max_neighbors if model.config.has_retrieval else 0
    made = Decoder(
        model,
        limits.max_sequences,
        length,
        neighbors,
        lambda ids: tokenizer.decode_batch(np.asarray([ids], np.int64))[0],
        tokenizer.pad_id,
    )
    made = made if decoder is None else decoder(made)
    return TextGenerator("tiny", Engine(made, limits, Measures()), tokenizer, services)


@contextmanager
def running(generator):
    """With its engine."""
    generator.engine.start()
    try:
        yield generator
    finally:
        generator.engine.close()


@contextmanager
def server(generator, credentials=None):
    """The URL of a real server of a generator."""
    app = create_app(generator, credentials)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", backlog=2048)
    served, bound = uvicorn.Server(config), socket.socket()
    bound.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(served.serve([bound])), daemon=True)
    with running(generator):
        thread.start()
        wait_until(lambda: served.started)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        served.should_exit = True
        thread.join(20)


@lru_cache(maxsize=4)
def app_of(generator, credentials=None):
    return create_app(generator, credentials)


@asynccontextmanager
async def client(generator, credentials=None, **options):
    """Without a socket; the engine must run. Streams arrive as a whole."""
    transport = httpx.ASGITransport(app_of(generator, credentials))
    async with httpx.AsyncClient(
        transport=transport, base_url="http://127.0.0.1", timeout=60, **options
    ) as made:
        yield made


def ask(generator, *requests, credentials=None):
    """The answers to (method, path, body) one after the other, without a socket."""

    async def answers():
        async with client(generator, credentials) as to:
            return [await to.request(m, path, json=body) for m, path, body in requests]

    return asyncio.run(answers())


def complete(generator, **body):
    """The JSON of a completion that must succeed."""
    [answer] = ask(generator, ("POST", "/v1/completions", {"temperature": 0, **body}))
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream_events(text):
    """Of a stream of server-sent events; the last must say that it is done."""
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
