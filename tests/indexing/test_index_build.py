from dataclasses import replace

import faiss
import numpy as np
import pytest

from etl.storage import StageFolder, StorageError
from indexing import faiss_index, index_build
from indexing.cluster import ClusterError, run_tasks
from indexing.embeddings import EmbedTask, commit_embeddings, embed_block
from indexing.faiss_index import IndexBuildError
from indexing.index_build import IndexTask, open_index
from jobs.build_index import plan_embedding
from tests.indexing.conftest import EMBEDDER

pytestmark = pytest.mark.dask


def make_task(corpus, name, factory="Flat", total_shards=1, nprobe=None):
    return IndexTask(
        folder=StageFolder(f"{corpus.folder}/index-{name}"),
        embeddings_url=corpus.embeddings.url,
        factory=factory,
        train_index_size=1000,
        seed=0,
        nprobe=nprobe,
        total_shards=total_shards,
        recall_sample=50,
        recall_k=5,
        details={"dataset_fingerprint": corpus.retrieval.manifest.fingerprint, **corpus.facts},
    )


def build(task):
    index_build.train(task)
    for i in range(task.total_shards):
        index_build.add(task, i)
    return index_build.merge(task)


def test_the_corpus_has_what_the_tests_are_about(corpus):
    counts = np.diff(corpus.retrieval.document_first_chunk)
    assert counts.max() > 20
    assert counts.min() == 1
    assert corpus.retrieval.is_all_pad(np.arange(corpus.retrieval.num_chunks)).sum() >= 3


def test_vectors_are_of_unit_length_and_pads_have_none(corpus):
    ids = np.arange(corpus.retrieval.num_chunks)
    norms = np.linalg.norm(corpus.embeddings.rows(ids).astype(np.float32), axis=1)
    pads = corpus.retrieval.is_all_pad(ids)
    assert (norms[pads] == 0).all()
    np.testing.assert_allclose(norms[~pads], 1, atol=2e-3)


def test_embedding_again_gives_the_same_bytes_whatever_the_worker(corpus, client, tmp_path):
    task = plan_embedding(corpus.retrieval, EMBEDDER, corpus.facts, 32, str(tmp_path))
    blocks = range(len(corpus.embeddings.manifest["blocks"]))
    run_tasks(client, embed_block, task, reversed(blocks), "embed")
    again = commit_embeddings(task, corpus.retrieval.num_chunks)
    assert again["blocks"] == corpus.embeddings.manifest["blocks"]


def test_chunks_that_another_dataset_holds_are_not_embedded_again(corpus, tmp_path):
    reuse = {
        "reuse_dataset_url": corpus.retrieval.url,
        "reuse_url": corpus.embeddings.url,
    }
    task = plan_embedding(corpus.training, EMBEDDER, corpus.facts, 1000, str(tmp_path), **reuse)
    record = embed_block(task, 0)
    assert record["reused"] == record["rows"] == corpus.training.num_chunks


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "IVF4,SQ8"])
def test_merged_shards_are_byte_equal_to_a_single_index(corpus, client, factory):
    name = factory.replace(",", "-")
    whole = build(make_task(corpus, f"{name}-whole", factory))
    task = make_task(corpus, f"{name}-sharded", factory, total_shards=3)
    index_build.train(task)
    run_tasks(client, index_build.add, task, [2, 0, 1], "add")
    sharded = index_build.merge(task)
    assert sharded["files"]["index"]["sha256"] == whole["files"]["index"]["sha256"]
    assert sharded["recall"] == whole["recall"]
    pads = corpus.retrieval.is_all_pad(np.arange(corpus.retrieval.num_chunks))
    assert sharded["vectors"] == (~pads).sum()


def test_recall_is_that_of_a_brute_force_count(corpus):
    task = make_task(corpus, "lists", "IVF8,SQ8", nprobe=1)
    reported = build(task)["recall"]
    assert 0 < reported["recall_at_k"] < 1  # one list of eight misses some
    vectors = corpus.embeddings.rows(np.arange(corpus.retrieval.num_chunks)).astype(np.float64)
    chosen = np.sort(np.random.default_rng(1).permutation(len(vectors))[:50])
    chosen = chosen[vectors[chosen].any(axis=1)]
    _, found = open_index(task.folder.url).load().search(vectors[chosen].astype(np.float32), 5)
    exact = vectors[chosen] @ vectors.T
    exact[:, ~vectors.any(axis=1)] = -9
    least = np.sort(exact, axis=1)[:, -5]
    hits = [
        sum(exact[row, i] >= least[row] - 1e-9 for i in ids if i >= 0) / 5
        for row, ids in enumerate(found)
    ]
    assert reported["recall_at_k"] == pytest.approx(np.mean(hits))
    assert reported["queries"] == len(chosen)
    assert reported["half_width_95"] == pytest.approx(1.96 * np.std(hits) / len(hits) ** 0.5)


def test_exact_index_has_full_recall(corpus):
    assert build(make_task(corpus, "flat"))["recall"]["recall_at_k"] == 1


def test_stages_run_again_do_nothing_and_missing_ones_are_named(corpus):
    task = make_task(corpus, "stages", total_shards=2)
    with pytest.raises(StorageError, match="run the train stage first"):
        index_build.add(task, 0)
    trained = index_build.train(task)
    index_build.add(task, 0)
    with pytest.raises(StorageError, match=r"shards \[1\] of 2 are missing"):
        index_build.merge(task)
    with pytest.raises(IndexBuildError, match=r"shard_id 2 of 2"):
        index_build.add(task, 2)
    index_build.add(task, 1)
    merged = index_build.merge(task)
    assert (index_build.train(task), index_build.merge(task)) == (trained, merged)


def test_index_cut_after_it_was_published_is_not_opened(corpus):
    task = make_task(corpus, "cut")
    build(task)
    path = StageFolder(task.folder.url).path_of(
        open_index(task.folder.url).manifest["files"]["index"]["name"]
    )
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(StorageError, match="1000 bytes"):
        open_index(task.folder.url).load()


def test_options_that_cannot_act_are_refused(corpus):
    with pytest.raises(IndexBuildError, match="no inverted lists"):
        index_build.train(make_task(corpus, "nprobe", nprobe=4))
    with pytest.raises(IndexBuildError, match="cannot train 'IVF5000"):
        index_build.train(make_task(corpus, "many", "IVF5000,Flat"))
    with pytest.raises(FileNotFoundError, match="expected the folder"):
        open_index(f"{corpus.folder}/absent")


def test_a_vector_that_is_not_finite_is_refused(corpus):
    broken = type(corpus.embeddings)(corpus.embeddings.url, corpus.embeddings.manifest)
    block = np.array(broken.block(0))
    block[3, 5] = np.nan
    broken._maps[0] = block
    index = faiss.index_factory(broken.dimension, "IDMap,Flat")
    with pytest.raises(IndexBuildError, match="not all finite"):
        faiss_index.add_rows(index, broken, 0, 10)


def test_failing_tasks_are_set_aside_and_the_first_is_named(corpus, client):
    task = make_task(corpus, "untrained", total_shards=3)
    with pytest.raises(StorageError, match="run the train stage first"):
        run_tasks(client, index_build.add, task, range(3), "add")
    unreadable = replace(task, embeddings_url=None, folder=None)
    with pytest.raises(ClusterError, match="3 of 3 tasks failed; task 0"):
        run_tasks(client, index_build.add, unreadable, range(3), "add")


def test_missing_embeddings_are_named(corpus, tmp_path):
    task = EmbedTask(StageFolder(str(tmp_path)), corpus.retrieval.url, EMBEDDER, 32, {})
    with pytest.raises(StorageError, match="block 0 is missing"):
        commit_embeddings(task, corpus.retrieval.num_chunks)
