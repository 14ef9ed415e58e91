"""A dataset, index and map with planted faults: a hub, equal chunks, vectors of other lengths. Real
files throughout; the vectors are made up, so there is no embedder."""

import json
import random

import numpy as np
import pytest

from etl.storage import StageFolder
from indexing import index_build
from indexing.built_index import open_index
from tests import small_data
from tests.indexing.made_up_vectors import store_embeddings
from tests.small_data import CHUNK_SIZE, Data, write_map
from tests.texts import SUBJECTS

K = 3
DIMENSION = 16
SCRIPT = "<script>alert(1)</script>"
PADS = str(10**14)
"""With the end-of-document token exactly one chunk: NeMo's padding adds a chunk of pads."""


def write_judged_corpus(path):
    """Documents in two packages of three folders; two in a file; two that begin alike; one with
    markup; one with a chunk of pads."""
    generator = random.Random(3)
    with open(path, "w") as file:
        for i in range(30):
            words = " ".join(generator.choices(SUBJECTS[i % 3], k=generator.randrange(12, 40)))
            text = f"{i} {words}"
            if i in (4, 9):
                text = f"{'harbor light ' * CHUNK_SIZE}{i} {words}"
            if i == 7:
                text = f"{SCRIPT} {words}"
            if i == 11:
                text = PADS
            src = f"package{i % 2}/folder{i % 3}/file{i // 4}.txt"
            file.write(json.dumps({"text": text, "src": src}) + "\n")


def judged_data(folder, tokenizer_url):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_data, "write_corpus", write_judged_corpus)
        return small_data.prepare_plainly(folder, tokenizer_url)


def judged_vectors(retrieval, seed=0):
    """[num_chunks, DIMENSION] fp16; two have length 2, one of a chunk with text is zero, two are
    equal, chunks of pads have none."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((retrieval.num_chunks, DIMENSION))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[[3, 6]] *= 2
    vectors[8] = vectors[5]
    vectors[2] = 0
    vectors[retrieval.is_all_pad(np.arange(retrieval.num_chunks))] = 0
    return vectors.astype(np.float16)


def build_index(folder, retrieval, vectors, factory="Flat", indexed=None):
    """The finished index of vectors, in `folder`, by the stages of the index job."""
    embeddings = store_embeddings(folder, vectors, block_chunks=64)
    task = index_build.IndexTask(
        folder=StageFolder(str(folder / "index")),
        embeddings_url=embeddings.url,
        factory=factory,
        metric="inner_product",
        train_index_size=10_000,
        seed=0,
        nprobe=None,
        target_recall=None,
        total_shards=1,
        merge_shards=True,
        indexed_chunks=indexed or retrieval.num_chunks,
        recall_sample=50,
        recall_k=K,
        device="cpu",
        details={
            "dataset_fingerprint": retrieval.manifest.fingerprint,
            "embedder": {"name": "made up"},
        },
    )
    for stage in (index_build.train, index_build.add, index_build.merge, index_build.tune):
        stage(task, 0)
    return open_index(task.folder.url)


def hub_neighbors(training, retrieval, hub):
    """[rows, K] ids of a map: chunks of other documents and clusters; the hub first in all rows
    that may have it; one place empty in every fifth row."""
    rng = np.random.default_rng(1)
    numbers = np.arange(training.num_chunks)
    own, keys = training.chunk_keys(numbers), retrieval.chunk_keys(np.arange(retrieval.num_chunks))
    has_text = retrieval.chunk_bytes(np.arange(retrieval.num_chunks)) > 0
    found = np.full((training.num_chunks, K), -1)
    for row in numbers[training.chunk_bytes(numbers) > 0]:
        allowed = np.flatnonzero(has_text & (keys != own[row]).all(axis=1))
        chosen = rng.permutation(allowed[allowed != hub])[:K]
        found[row] = [hub, *chosen[:-1]] if hub in allowed else chosen
        if row % 5 == 0:
            found[row, -1] = -1
    return found


def script_chunk(retrieval):
    """The chunk whose text begins with the markup."""
    return int(retrieval.document_first_chunk[7])


def plant(folder, tokenizer_url):
    """(datasets and map with a hub, index) in `folder`."""
    training, retrieval = judged_data(folder, tokenizer_url)
    index = build_index(folder, retrieval, judged_vectors(retrieval))
    neighbors = hub_neighbors(training, retrieval, script_chunk(retrieval))
    built = write_map(folder, training, retrieval, neighbors)
    return Data(training, retrieval, built), index
