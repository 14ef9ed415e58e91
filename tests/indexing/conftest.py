"""A Dask cluster, embeddings of a real sentence model, an S3 server, and processes for whole
jobs."""

from dataclasses import asdict, dataclass
from typing import Any

import fsspec
import pytest

from etl.cache import CACHE_VARIABLE
from etl.dataset import Dataset
from indexing.cluster import ClusterConfig, open_runner
from indexing.embedder import embedder_facts
from indexing.embeddings import Embeddings, open_embeddings
from jobs.build_index import embed_dataset, plan_embedding
from tests.indexing.job_runs import EMBEDDER, Reference, Run, contents
from tests.job_launcher import Launcher
from tests.s3_server import s3_server
from tests.small_data import prepare_plainly


@dataclass(frozen=True)
class Corpus:
    """What the index and map tests start from."""

    training: Dataset
    retrieval: Dataset
    embeddings: Embeddings
    facts: dict[str, Any]
    folder: str


@pytest.fixture(scope="package")
def s3(tmp_path_factory):
    """The proxy before an S3 server with a bucket; workers and jobs that start later know it."""
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as proxy:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        fsspec.filesystem("s3").mkdir("bucket")
        yield proxy


@pytest.fixture(scope="package")
def launcher(s3):
    started = Launcher(asdict(EMBEDDER))
    yield started
    started.stop()


@pytest.fixture(scope="package")
def runner(s3):
    with open_runner(ClusterConfig(num_workers=2)) as running:
        yield running


@pytest.fixture(scope="package")
def corpus(runner, tokenizer_url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    training, retrieval = prepare_plainly(folder, tokenizer_url)
    facts = runner.call(embedder_facts, EMBEDDER)
    task = plan_embedding(retrieval, EMBEDDER, facts, 32, str(folder))
    embed_dataset(runner, task, retrieval.num_chunks)
    return Corpus(training, retrieval, open_embeddings(task.folder.url), facts, str(folder))


@pytest.fixture(scope="package")
def reference(launcher, corpus, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("reference"))
    run = Run(launcher, corpus.training.url, corpus.retrieval.url, folder)
    index_url = run.index().result()["index_url"]
    return Reference(index_url, contents(index_url, run.map(index_url).result()["map_url"]))


@pytest.fixture(scope="package")
def remote_run(launcher, corpus):
    """Run by name, with datasets and outputs on S3."""
    urls = []
    for name, dataset in (("training", corpus.training), ("retrieval", corpus.retrieval)):
        urls.append(f"s3://bucket/data/{name}")
        fsspec.filesystem("s3").put(f"{dataset.url.rstrip('/')}/", f"{urls[-1]}/", recursive=True)
    return lambda name: Run(launcher, *urls, f"s3://bucket/{name}")


@pytest.fixture
def local_run(launcher, corpus, tmp_path):
    return Run(launcher, corpus.training.url, corpus.retrieval.url, str(tmp_path / "run"))
