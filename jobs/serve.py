"""serve | `python -m jobs.serve` | FastAPI | reads an exported model or a run, an index and its
retrieval dataset | answers HTTP; one line on stdout, with the URL, once it does.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from fastapi import FastAPI

from etl.dataset import Dataset
from etl.storage import StorageError
from etl.tokenizer import TextTokenizer
from indexing.embeddings import dataset_tokenizer
from jobs.command_line import run_job
from model.checkpoint import check_tokenizer, load_model, require_checkpoint
from model.decoding import Decoder
from model.export import load_exported
from model.retro import Retro
from serving.api import create_app
from serving.chunk_rules import ChunkRules
from serving.engine import Engine, warm_up
from serving.generator import TextGenerator
from serving.limits import Limits
from serving.measures import Measures
from serving.process import bind, serve, url_of
from serving.security import Credentials, SecurityConfig, check_exposure, load_credentials
from serving.services import RetrievalConfig, RetrievalServices, open_services

log = logging.getLogger(__name__)

_PAGE = "/ui"


@dataclass(frozen=True)
class ServeConfig:
    """Serves a model with live retrieval over HTTP, until SIGTERM or SIGINT.

    Attributes:
        model_url: Folder of an exported model (jobs.export_model).
        run_url: Folder of a jobs.pretrain run, whose newest checkpoint is served; instead of
            model_url.
        dataset_url: Folder of a dataset with the run's tokenizer; only with a run_url that is
            served without an index.
        name: Of the model, for clients; by default the last part of its URL.
        retrieval: What there is to retrieve from; nothing: retrieval is off.
        host: Address to listen on. Others than this machine's own need secrets.
        port: To listen on; 0: any that is free.
        device: cpu or cuda.
        dtype: Of the model's parameters; by default as they are stored.
        limits: What the server takes at most.
        security: Where its secrets are.
        page: Also serve the web page, at /ui.
    """

    model_url: str | None = None
    run_url: str | None = None
    dataset_url: str | None = None
    name: str | None = None
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    host: str = "127.0.0.1"
    port: int = 8000
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] | None = None
    limits: Limits = field(default_factory=Limits)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    page: bool = False


def run(config: ServeConfig) -> None:
    if config.security.page_file is not None and not config.page:
        raise ValueError(
            "security.page_file has no effect without the page; set page, or leave it out"
        )
    credentials = load_credentials(config.security, os.environ)
    check_exposure(config.host, credentials, config.page)
    with bind(config.host, config.port) as bound:
        url = url_of(bound)
        generator = open_generator(config)
        app = create_app(generator, credentials, _PAGE if config.page else None)
        leave = _mount_page(app, generator, credentials) if config.page else None

        def announce() -> None:
            page = f", its page at {url}{_PAGE}" if config.page else ""
            print(f"{generator.name} is served at {url}{page}", file=sys.stderr, flush=True)
            print(json.dumps({"url": url, "model": generator.name}), flush=True)

        serve(app, generator.engine, bound, announce, leave)


def open_generator(config: ServeConfig) -> TextGenerator:
    """Everything loaded, checked and warmed up; the engine is not started.

    Raises:
        FileNotFoundError: no model, index or dataset.
        StorageError: they do not belong together.
        ValueError: not exactly one model, a dataset that nothing is read from, retrieval for a
            plain decoder, or no such device.
    """
    if (config.model_url is None) == (config.run_url is None):
        raise ValueError(
            f"model_url is {config.model_url}, run_url is {config.run_url}; name one of them"
        )
    if config.dataset_url is not None and (config.model_url or config.retrieval.retrieval_url):
        raise ValueError(
            f"dataset_url is {config.dataset_url}, but the exported model or the retrieval dataset "
            "has the tokenizer; leave dataset_url out"
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA device; set device to cpu")
    model = _model(config)
    services = open_services(config.retrieval, config.model_url)
    if services is not None and not model.config.has_retrieval:
        raise ValueError(
            "the model is a plain decoder, which retrieves nothing; leave retrieval out"
        )
    tokenizer = _tokenizer(config, model, services)
    model = model.to(config.device, None if config.dtype is None else getattr(torch, config.dtype))
    decoder = _decoder(model, tokenizer, config.limits)
    log.info("warming up")
    prompt = [tokenizer.eod_id] * model.config.chunk_size
    warm_up(decoder, prompt, services and services.combined)
    engine = Engine(decoder, config.limits, Measures())
    url = config.model_url or config.run_url or ""
    return TextGenerator(
        config.name or url.rstrip("/").rpartition("/")[2], engine, tokenizer, services
    )


def _model(config: ServeConfig) -> Retro:
    if config.model_url is not None:
        return load_exported(config.model_url)
    assert config.run_url is not None
    return load_model(config.run_url)


def _tokenizer(
    config: ServeConfig, model: Retro, services: RetrievalServices | None
) -> TextTokenizer:
    """The model's. An exported one has it, and `open_services` has compared it."""
    if config.model_url is not None:
        return ChunkRules.of_export(config.model_url).tokenizer
    assert config.run_url is not None
    url = config.retrieval.retrieval_url or config.dataset_url
    if url is None:
        raise ValueError(
            "a run does not hold its tokenizer; name a dataset that was made with it (dataset_url),"
            " or serve an exported model"
        )
    dataset = Dataset(url)
    check_tokenizer(require_checkpoint(config.run_url), dataset.manifest)
    if services is not None and services.rules.chunk_size != model.config.chunk_size:
        raise StorageError(
            f"the model of {config.run_url} has chunk_size {model.config.chunk_size}, the dataset "
            f"{url} has {services.rules.chunk_size}; it retrieves from datasets prepared like its "
            "own only"
        )
    return dataset_tokenizer(dataset)


def _decoder(model: Retro, tokenizer: TextTokenizer, limits: Limits) -> Decoder:
    # A prompt is filled up with less than a chunk.
    length = model.config.chunk_size + limits.max_prompt_tokens + limits.max_new_tokens
    neighbors = limits.max_neighbors if model.config.has_retrieval else 0
    decode, pad_id = tokenizer.decode, tokenizer.pad_id
    return Decoder(model, limits.max_sequences, length, neighbors, decode, pad_id)


def _mount_page(
    app: FastAPI, generator: TextGenerator, credentials: Credentials
) -> Callable[[], None]:
    from serving.page import mount_page

    return mount_page(app, generator, _PAGE, credentials)


if __name__ == "__main__":
    run_job("Serve a model with live retrieval over HTTP.", ServeConfig, run)
