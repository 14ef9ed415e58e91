import json
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest

from etl.storage import StageFolder, StorageError
from indexing import faiss_index, index_build
from indexing.built_index import open_index
from indexing.cluster import ClusterError
from indexing.embeddings import (
    EmbedTask,
    chunk_texts,
    commit_embeddings,
    dataset_tokenizer,
    embed_block,
)
from indexing.exact_torch import TorchSearcher
from indexing.faiss_index import IndexBuildError
from indexing.index_build import IndexTask
from indexing.inverted_lists import InvertedLists
from jobs.build_index import plan_embedding
from tests.indexing.conftest import EMBEDDER

pytestmark = pytest.mark.dask


def make_task(corpus, name, factory="Flat", total_shards=1, nprobe=None):
    return IndexTask(
        folder=StageFolder(f"{corpus.folder}/index-{name}"),
        embeddings_url=corpus.embeddings.url,
        factory=factory,
        metric="inner_product",
        train_index_size=1000,
        seed=0,
        nprobe=nprobe,
        target_recall=None,
        total_shards=total_shards,
        merge_shards=True,
        indexed_chunks=corpus.retrieval.num_chunks,
        recall_sample=50,
        recall_k=5,
        device="cpu",
        details={"dataset_fingerprint": corpus.retrieval.manifest.fingerprint, **corpus.facts},
    )


def build(task):
    index_build.train(task)
    for i in range(task.total_shards):
        index_build.add(task, i)
    index_build.merge(task)
    return index_build.tune(task)


def test_the_corpus_has_what_the_tests_are_about(corpus):
    counts = np.diff(corpus.retrieval.document_first_chunk)
    assert counts.max() > 20
    assert counts.min() == 1
    assert corpus.retrieval.is_all_pad(np.arange(corpus.retrieval.num_chunks)).sum() >= 3


def test_vectors_are_of_unit_length_and_chunks_without_text_have_none(corpus):
    ids = np.arange(corpus.retrieval.num_chunks)
    norms = np.linalg.norm(corpus.embeddings.rows(ids).astype(np.float32), axis=1)
    texts = chunk_texts(
        corpus.retrieval.get_chunk(ids, continuation=False), dataset_tokenizer(corpus.retrieval)
    )
    empty = np.asarray([not text.strip() for text in texts])
    assert (norms[empty] == 0).all()
    np.testing.assert_allclose(norms[~empty], 1, atol=2e-3)
    assert empty[corpus.retrieval.is_all_pad(ids)].all()


def test_embedding_again_gives_the_same_bytes_whatever_the_worker(corpus, runner, tmp_path):
    task = plan_embedding(corpus.retrieval, EMBEDDER, corpus.facts, 32, str(tmp_path))
    blocks = range(len(corpus.embeddings.manifest["blocks"]))
    runner.run(embed_block, task, reversed(blocks), "embed")
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


@pytest.mark.parametrize(
    "factory", ["Flat", "SQ8", "PQ8x4", "IVF4,SQ8", "IVF4,PQ8x4", "IVF4,RaBitQ"]
)
def test_merged_shards_are_byte_equal_to_a_single_index(corpus, runner, factory):
    name = factory.replace(",", "-")
    whole = build(make_task(corpus, f"{name}-whole", factory))
    task = make_task(corpus, f"{name}-sharded", factory, total_shards=3)
    index_build.train(task)
    runner.run(index_build.add, task, [2, 0, 1], "add")
    index_build.merge(task)
    sharded = index_build.tune(task)
    assert sharded["files"]["index"]["sha256"] == whole["files"]["index"]["sha256"]
    assert sharded["recall"] == whole["recall"]
    vectors = corpus.embeddings.rows(np.arange(corpus.retrieval.num_chunks))
    assert sharded["vectors"] == vectors.any(axis=1).sum()


def test_recall_is_that_of_a_brute_force_count(corpus):
    task = make_task(corpus, "lists", "IVF8,SQ8", nprobe=1)
    reported = build(task)["recall"]
    assert 0 < reported["recall_at_k"] < 1  # one list of eight misses some
    vectors = corpus.embeddings.rows(np.arange(corpus.retrieval.num_chunks)).astype(np.float64)
    chosen = np.sort(np.random.default_rng(1).permutation(len(vectors))[:50])
    chosen = chosen[vectors[chosen].any(axis=1)]
    lists = InvertedLists(open_index(task.folder.url).searcher().lists.index)
    members = [set(lists.read(i)[0].tolist()) for i in range(8)]
    nearest = lists.assign(vectors[chosen].astype(np.float32), 1)[:, 0]
    exact = vectors[chosen] @ vectors.T
    exact[:, ~vectors.any(axis=1)] = -9
    exact[np.arange(len(chosen)), chosen] = -9
    least = np.sort(exact, axis=1)[:, -5]
    hits = []
    for row, number in enumerate(nearest):
        reachable = sorted(members[number] - {chosen[row]}, key=lambda i: -exact[row, i])[:5]
        hits.append(sum(exact[row, i] >= least[row] for i in reachable) / 5)
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
    with pytest.raises(StorageError, match="1 of 2 records are missing: shards/00001-of-00002"):
        index_build.merge(task)
    with pytest.raises(StorageError, match="run the merge stage first"):
        index_build.tune(task)
    with pytest.raises(IndexBuildError, match=r"shard_id 2 of 2"):
        index_build.add(task, 2)
    index_build.add(task, 1)
    merged = index_build.merge(task)
    assert (index_build.train(task), index_build.merge(task)) == (trained, merged)
    tuned = index_build.tune(task)
    assert index_build.tune(task) == tuned


def test_index_cut_after_it_was_published_is_not_opened(corpus):
    task = make_task(corpus, "cut")
    build(task)
    path = StageFolder(task.folder.url).path_of(
        open_index(task.folder.url).manifest["files"]["index"]["name"]
    )
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(StorageError, match="1000 bytes"):
        open_index(task.folder.url).searcher()


def tampered(task, record, **changes):
    """Replaces fields of a record."""
    path = Path(task.folder.path_of(f"{record}.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_merging_refuses_shards_of_other_chunks_and_of_another_trained_index(corpus):
    task = make_task(corpus, "foreign", "IVF4,SQ8", total_shards=2)
    index_build.train(task)
    first = index_build.add(task, 0)
    index_build.add(task, 1)
    second = task.shard_record(1)
    right = {key: task.folder.record(second)[key] for key in ("start", "stop", "trained")}
    tampered(task, second, start=first["start"], stop=first["stop"])
    with pytest.raises(StorageError, match=r"holds chunks 0\.\.\d+, expected"):
        index_build.merge(task)
    tampered(task, second, **right | {"trained": "0" * 64})
    with pytest.raises(StorageError, match="was added to the trained index 0000"):
        index_build.merge(task)
    tampered(task, second, **right)
    assert index_build.merge(task)["vectors"] > 0


def test_a_shard_whose_bytes_changed_is_not_merged(corpus):
    task = make_task(corpus, "damaged", total_shards=2)
    index_build.train(task)
    name = index_build.add(task, 0)["files"]["index"]["name"]
    index_build.add(task, 1)
    with open(task.folder.path_of(name), "r+b") as file:
        file.seek(-5, 2)
        file.write(b"\xff")
    with pytest.raises(StorageError, match="the file is damaged: delete it"):
        index_build.merge(task)
    Path(task.folder.path_of(name)).unlink()
    index_build.add(task, 0)
    assert build(task)["recall"]["recall_at_k"] == 1


def test_part_of_the_documents_can_be_indexed(corpus):
    stop = int(corpus.retrieval.document_first_chunk[5])
    task = replace(make_task(corpus, "part", total_shards=2), indexed_chunks=stop)
    manifest = build(task)
    vectors = corpus.embeddings.rows(np.arange(stop))
    assert manifest["vectors"] == vectors.any(axis=1).sum()
    assert manifest["recall"]["recall_at_k"] == 1
    assert (
        open_index(task.folder.url).searcher().search(vectors[:9].astype("f4"), 3)[1].max() < stop
    )


def test_nprobe_is_chosen_for_the_target_recall(corpus):
    task = replace(make_task(corpus, "tuned", "IVF8,SQ8"), target_recall=0.9)
    manifest = build(task)
    curve = {at["nprobe"]: at["recall_at_k"] for at in manifest["recall_by_nprobe"]}
    assert curve[manifest["nprobe"]] == manifest["recall"]["recall_at_k"] >= 0.9
    assert open_index(task.folder.url).searcher().nprobe == manifest["nprobe"]


def test_an_exact_index_is_measured_by_torch_where_a_device_is_named(corpus):
    # The device of the code path for GPUs, on hardware that every machine has.
    task = replace(make_task(corpus, "torch"), device="cpu:0")
    manifest = build(task)
    assert manifest["recall"]["recall_at_k"] == 1
    searcher = open_index(task.folder.url).searcher(device=task.device)
    assert isinstance(searcher, TorchSearcher)


def test_options_that_cannot_act_are_refused(corpus):
    with pytest.raises(IndexBuildError, match="no inverted lists"):
        index_build.train(make_task(corpus, "nprobe", nprobe=4))
    with pytest.raises(IndexBuildError, match=r"target_recall is 0\.9, but 'Flat'"):
        index_build.train(replace(make_task(corpus, "target"), target_recall=0.9))
    with pytest.raises(IndexBuildError, match="5000 inverted lists, but only"):
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


def test_failing_tasks_are_set_aside_and_the_first_is_named(corpus, runner):
    task = make_task(corpus, "untrained", total_shards=3)
    with pytest.raises(StorageError, match="run the train stage first"):
        runner.run(index_build.add, task, range(3), "add")
    unreadable = replace(task, embeddings_url=None, folder=None)
    with pytest.raises(ClusterError, match="3 of 3 tasks failed; task 0"):
        runner.run(index_build.add, unreadable, range(3), "add")


def test_missing_embeddings_are_named(corpus, tmp_path):
    task = EmbedTask(StageFolder(str(tmp_path)), corpus.retrieval.url, EMBEDDER, 32, {})
    with pytest.raises(StorageError, match="records are missing: blocks/000000, "):
        commit_embeddings(task, corpus.retrieval.num_chunks)
