import numpy as np
import pytest

from indexing import faiss_index
from indexing.exact_search import BlockSearcher
from indexing.inverted_lists import InvertedLists
from indexing.recall import sample_recall, tune
from indexing.searchers import ListSearcher
from tests.indexing.made_up_vectors import brute_force, made_up_vectors, store_embeddings

COUNT = 1500


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    return store_embeddings(tmp_path_factory.mktemp("vectors"), made_up_vectors(COUNT))


@pytest.fixture(scope="module")
def lists(embeddings):
    index = faiss_index.train_index("IVF32,Flat", "inner_product", embeddings, COUNT, COUNT, 0)
    faiss_index.add_rows(index, embeddings, 0, COUNT)
    return InvertedLists(index)


@pytest.fixture(scope="module")
def sample(embeddings):
    return sample_recall(embeddings, BlockSearcher(embeddings, COUNT), 300, 10, seed=1)


def test_the_sample_is_drawn_without_replacement_from_chunks_with_text(embeddings, sample):
    assert len(np.unique(sample.ids)) == len(sample.ids) > 250
    assert embeddings.rows(sample.ids).any(axis=1).all()


def test_the_bar_is_the_tenth_nearest_other_chunk(embeddings, sample):
    vectors = embeddings.rows(np.arange(COUNT))
    nearest = brute_force(vectors, sample.ids, 10)[:, -1]
    expected = (vectors[sample.ids].astype(float) * vectors[nearest].astype(float)).sum(axis=1)
    np.testing.assert_allclose(sample.kth_scores, expected, atol=1e-12)


def test_exact_search_has_full_recall(embeddings, sample):
    assert sample.measure(BlockSearcher(embeddings, COUNT)).recall_at_k == 1


def test_tuning_takes_the_least_number_of_lists_that_reaches_the_target(lists, sample):
    nprobe, curve = tune(sample, lambda at: ListSearcher(lists, at), 32, 0.98)
    recalls = {at: found.recall_at_k for at, found in curve}
    assert list(recalls) == [2**i for i in range(len(recalls))]
    assert recalls[nprobe] >= 0.98 > recalls[nprobe // 2]
    assert max(recalls) == 2 * nprobe  # what more lists would bring
    assert sorted(recalls.values()) == list(recalls.values())


def test_a_target_out_of_reach_visits_all_lists(lists, sample):
    nprobe, curve = tune(sample, lambda at: ListSearcher(lists, at), 32, 1.1)
    assert nprobe == curve[-1][0] == 32


def test_a_set_smaller_than_k_is_measured_with_what_there_is(tmp_path):
    small = store_embeddings(tmp_path, made_up_vectors(5))
    measured = sample_recall(small, BlockSearcher(small, 5), 10, 10, seed=0)
    assert measured.k == 4
    assert measured.measure(BlockSearcher(small, 5)).recall_at_k == 1
