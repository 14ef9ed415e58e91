from dataclasses import replace

import numpy as np
import pytest

from etl.storage import StageFolder, StorageError
from indexing import map_build
from indexing.knn_manifest import open_map
from indexing.map_build import MapTask
from indexing.stage_status import announce, read_status
from jobs.build_index import embed_dataset, plan_embedding
from tests.indexing.conftest import EMBEDDER
from tests.indexing.test_index_build import build, make_task

pytestmark = pytest.mark.dask
K = 6


@pytest.fixture(scope="module")
def search_task(corpus, runner):
    """Neighbors of the training dataset's chunks in an exact index."""
    index = make_task(corpus, "for-maps", total_shards=2)
    build(index)
    reuse = {"reuse_dataset_url": corpus.retrieval.url, "reuse_url": corpus.embeddings.url}
    queries = plan_embedding(corpus.training, EMBEDDER, corpus.facts, 32, corpus.folder, **reuse)
    embed_dataset(runner, queries, corpus.training.num_chunks)
    return MapTask(
        folder=StageFolder(f"{corpus.folder}/map"),
        queries=queries,
        index_url=index.folder.url,
        retrieval_url=corpus.retrieval.url,
        k=K,
        margin=2,
        nprobe=None,
        remove_duplicate=True,
        total_shards=1,
        index_shards=1,
        process_chunk_size=50,
        device="cpu",
        details={
            "training_fingerprint": corpus.training.manifest.fingerprint,
            "retrieval_fingerprint": corpus.retrieval.manifest.fingerprint,
        },
    )


@pytest.fixture(scope="module")
def built(search_task):
    map_build.search(search_task, 0)
    map_build.merge(search_task)
    return open_map(search_task.folder.url)


def rows(built, corpus):
    return built.load().get(np.arange(corpus.training.num_chunks))


def without_text(corpus):
    """Chunks of pads, or of the end of a document alone; ids are those of both datasets."""
    return ~corpus.embeddings.rows(np.arange(corpus.retrieval.num_chunks)).any(axis=1)


def brute_force(corpus, k, remove_duplicate=True):
    """By definition: scores in float64, ties by id, no chunk of the own document or of pads."""
    ids = np.arange(corpus.retrieval.num_chunks)
    vectors = corpus.embeddings.rows(ids).astype(np.float64)
    found = np.full((len(ids), k), -1)
    owner = corpus.retrieval.chunk_to_doc(ids)
    usable = vectors.any(axis=1)
    for i in ids[usable]:
        allowed = ids[usable & (owner != owner[i])] if remove_duplicate else ids[usable]
        best = sorted(allowed, key=lambda j: (-(vectors[j] @ vectors[i]), j))[:k]
        found[i, : len(best)] = best
    return found


def test_training_and_retrieval_chunks_have_the_same_ids_here(corpus):
    ids = np.arange(corpus.training.num_chunks)
    np.testing.assert_array_equal(
        corpus.training.get_chunk(ids), corpus.retrieval.get_chunk(ids, continuation=False)
    )


def test_neighbors_are_those_of_brute_force(built, corpus):
    np.testing.assert_array_equal(rows(built, corpus), brute_force(corpus, K))


def test_own_document_is_never_a_neighbor_and_rows_are_full_all_the_same(built, corpus):
    found = rows(built, corpus)
    own = corpus.training.chunk_to_doc(np.arange(len(found)))
    owners = corpus.retrieval.chunk_to_doc(np.maximum(found, 0).ravel()).reshape(found.shape)
    assert not ((owners == own[:, None]) & (found >= 0)).any()
    pads = without_text(corpus)
    assert (found[~pads] >= 0).all()  # margin 2 is far too small for the long document


def test_spans_of_documents_are_found_by_key(corpus):
    retrieval = corpus.retrieval
    keys = np.append(retrieval.document_keys[::-1], np.uint64(12345))
    spans = retrieval.chunk_spans(keys)
    assert spans[-1].tolist() == [0, 0]
    first = retrieval.document_first_chunk
    np.testing.assert_array_equal(spans[:-1], np.stack([first[:-1], first[1:]], axis=1)[::-1])


def test_a_long_document_is_left_out_of_its_own_search_and_that_changes_nothing(
    search_task, corpus, built, monkeypatch
):
    monkeypatch.setattr("indexing.neighbors._LONG", 1)
    folder = StageFolder(f"{corpus.folder}/map-long")
    task = replace(search_task, folder=folder, total_shards=1)
    map_build.search(task, 0)
    map_build.merge(task)
    found = open_map(folder.url).load().get(np.arange(corpus.training.num_chunks))
    np.testing.assert_array_equal(found, rows(built, corpus))


def test_chunks_of_pads_have_no_neighbors_and_are_nobodys(built, corpus):
    found = rows(built, corpus)
    pads = without_text(corpus)
    assert pads.any()
    assert (found[pads] == -1).all()
    assert not np.isin(np.flatnonzero(pads), found).any()


def test_fill_rate_counts_the_filled_places(built, corpus):
    assert built.manifest["fill_rate"] == pytest.approx((rows(built, corpus) >= 0).mean())
    assert (built.manifest["k"], built.manifest["rows"]) == (K, corpus.training.num_chunks)


@pytest.mark.parametrize("total_shards", [2, 5])
def test_merged_shards_are_byte_equal_to_a_single_map(
    built, search_task, runner, corpus, total_shards
):
    folder = StageFolder(f"{corpus.folder}/map-{total_shards}")
    task = replace(search_task, folder=folder, total_shards=total_shards)
    runner.run(map_build.search, task, reversed(range(total_shards)), "search")
    merged = map_build.merge(task)
    for part in ("map", "scores"):
        assert merged["files"][part]["sha256"] == built.manifest["files"][part]["sha256"]
    assert map_build.merge(task) == merged


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQ8"])
def test_an_index_kept_in_shards_gives_the_same_map_as_a_merged_one(
    built, search_task, runner, corpus, factory
):
    nprobe = 4 if factory != "Flat" else None
    apart = make_task(corpus, f"apart-{factory}", factory, total_shards=3, nprobe=nprobe)
    apart = replace(apart, merge_shards=False)
    manifest = build(apart)
    assert len(manifest["files"]) == 3
    folder = StageFolder(f"{corpus.folder}/map-apart-{factory}")
    task = replace(
        search_task,
        folder=folder,
        index_url=apart.folder.url,
        total_shards=2,
        index_shards=3,
        margin=60,
    )
    with pytest.raises(StorageError, match="parts/00000-of-00002-in-00002; search these"):
        map_build.combine(task, 0)
    runner.run(map_build.search, task, range(6), "search")
    runner.run(map_build.combine, task, range(2), "combine")
    merged = map_build.merge(task)
    assert merged["files"]["map"]["sha256"] == built.manifest["files"]["map"]["sha256"]
    status = {stage: of for stage, (_, of) in task.stages.items()}
    assert status == {"search": 6, "combine": 2, "merge": 1}


def test_status_counts_records(search_task, corpus):
    folder = StageFolder(f"{corpus.folder}/maps/map-status")
    task = replace(search_task, folder=folder, total_shards=3)
    announce(folder, "knn", corpus.training.manifest.fingerprint, task.stages)
    map_build.search(task, 1)
    [found] = read_status(f"{corpus.folder}/maps", corpus.training.manifest.fingerprint)
    assert (found["kind"], found["finished"]) == ("knn", False)
    assert found["stages"]["search"] == {"done": 1, "of": 3}
    map_build.search(task, 0)
    map_build.search(task, 2)
    map_build.merge(task)
    [found] = read_status(f"{corpus.folder}/maps", corpus.training.manifest.fingerprint)
    assert found["finished"]
    assert read_status(f"{corpus.folder}/maps", "other") == []
    with pytest.raises(FileNotFoundError, match="nothing was started there"):
        read_status(f"{corpus.folder}/absent", "other")


def test_without_the_filter_the_best_neighbor_is_the_chunk_itself_or_its_equal(search_task, corpus):
    folder = StageFolder(f"{corpus.folder}/map-unfiltered")
    task = replace(search_task, folder=folder, remove_duplicate=False)
    map_build.search(task, 0)
    map_build.merge(task)
    expected = brute_force(corpus, K, remove_duplicate=False)
    np.testing.assert_array_equal(rows(open_map(folder.url), corpus), expected)


def test_more_neighbors_than_chunks_end_in_minus_one(search_task, corpus):
    folder = StageFolder(f"{corpus.folder}/map-wide")
    k = corpus.retrieval.num_chunks + 3
    map_build.search(replace(search_task, folder=folder, k=k), 0)
    map_build.merge(replace(search_task, folder=folder, k=k))
    np.testing.assert_array_equal(rows(open_map(folder.url), corpus), brute_force(corpus, k))


def test_missing_shards_are_named(search_task, corpus):
    task = replace(search_task, folder=StageFolder(f"{corpus.folder}/map-part"), total_shards=3)
    map_build.search(task, 1)
    expected = "2 of 3 records are missing: shards/00000-of-00003, shards/00002-of-00003; search"
    with pytest.raises(StorageError, match=expected):
        map_build.merge(task)
    with pytest.raises(FileNotFoundError, match="expected the folder"):
        open_map(task.folder.url)


def test_a_map_refuses_datasets_it_was_not_made_for(built, corpus):
    built.check_parents(corpus.training, corpus.retrieval)
    with pytest.raises(StorageError, match=corpus.training.manifest.fingerprint):
        built.check_parents(corpus.retrieval, corpus.retrieval)
    with pytest.raises(StorageError, match="the retrieval dataset"):
        built.check_parents(corpus.training, corpus.training)


def test_an_approximate_index_proposes_and_exact_scores_order(search_task, corpus):
    index = make_task(corpus, "approximate", "IVF4,SQ8", nprobe=4)
    build(index)
    folder = StageFolder(f"{corpus.folder}/map-approximate")
    task = replace(search_task, folder=folder, index_url=index.folder.url, margin=60)
    map_build.search(task, 0)
    map_build.merge(task)
    np.testing.assert_array_equal(rows(open_map(folder.url), corpus), brute_force(corpus, K))
