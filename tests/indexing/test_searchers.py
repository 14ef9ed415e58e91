import faiss
import numpy as np
import pytest
import torch

from indexing import faiss_index, list_search
from indexing.exact_search import BlockSearcher
from indexing.exact_torch import TorchSearcher
from indexing.faiss_index import IndexBuildError
from indexing.inverted_lists import InvertedLists
from indexing.list_search import search_by_list
from indexing.neighbors import NeighborFinder, best_of, exact_scores
from indexing.searchers import IndexSearcher, ListSearcher, open_searcher
from tests.indexing.made_up_vectors import brute_force, made_up_vectors, store_embeddings

COUNT, K = 2000, 8


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    return store_embeddings(tmp_path_factory.mktemp("vectors"), made_up_vectors(COUNT))


@pytest.fixture(scope="module")
def vectors(embeddings):
    return embeddings.rows(np.arange(COUNT))


def build(embeddings, factory, metric="inner_product", start=0, stop=COUNT):
    index = faiss_index.train_index(factory, metric, embeddings, COUNT, COUNT, 0)
    faiss_index.add_rows(index, embeddings, start, stop)
    return index


def keys(ids):
    """Each chunk is a document of its own."""
    return np.stack([ids, ids], axis=-1).astype(np.uint64)


def find(searcher, embeddings, ids, k=K):
    finder = NeighborFinder(searcher, embeddings.rows, keys, margin=4)
    return finder.find(embeddings.rows(ids), k, keys(ids))


def test_exact_scores_are_exact_whatever_the_order(vectors):
    left, right = vectors[:50], vectors[50:250].reshape(50, 4, -1)
    scores = exact_scores(left, right)
    shuffled = np.random.default_rng(0).permutation(vectors.shape[1])
    np.testing.assert_array_equal(scores, exact_scores(left[:, shuffled], right[..., shuffled]))
    scaled = [(a.astype(object) * 2**24).astype(object) for a in (left[:3], right[:3])]
    whole = [
        [sum(int(x) * int(y) for x, y in zip(q, v, strict=True)) for v in row]
        for q, row in zip(*scaled, strict=True)
    ]
    np.testing.assert_array_equal(scores[:3] * 2.0**48, np.asarray(whole, np.float64))


@pytest.mark.parametrize("kind", ["flat", "flat l2", "blocks", "torch"])
def test_exact_searches_are_brute_force(embeddings, vectors, kind):
    if kind.startswith("flat"):
        metric = "l2" if kind.endswith("l2") else "inner_product"
        searcher = IndexSearcher(build(embeddings, "Flat", metric))
    elif kind == "blocks":
        searcher = BlockSearcher(embeddings, COUNT)
    else:
        searcher = TorchSearcher(embeddings, COUNT, "cpu")
    ids = np.arange(0, COUNT, 3)
    ids = ids[vectors[ids].any(axis=1)]
    found, scores = find(searcher, embeddings, ids)
    if searcher.score_error is not None:
        np.testing.assert_array_equal(found, brute_force(vectors, ids, K))
    else:
        assert (found == brute_force(vectors, ids, K)).mean() > 0.99
    assert (np.diff(scores, axis=1) <= 0).all()


def test_torch_and_faiss_agree_on_part_of_the_chunks(embeddings, vectors):
    queries = vectors[:40].astype(np.float32)
    for stop in (1, 299, 301, 1203):
        expected = BlockSearcher(embeddings, stop).search(queries, 20)
        found = TorchSearcher(embeddings, stop, "cpu").search(queries, 20)
        np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
        assert ((found[1] < 0) == (expected[1] < 0)).all()
        assert found[1].max() < stop


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8", "IVF16,PQ8x4", "IVF16_HNSW8,SQ8"])
def test_search_by_list_finds_what_scanning_finds(embeddings, vectors, factory, metric):
    lists = InvertedLists(build(embeddings, factory, metric))
    queries = vectors[vectors.any(axis=1)][:500].astype(np.float32)
    scores, ids = search_by_list(lists, queries, 4, 10)
    scanned = lists.search(queries, lists.assign(queries, 4), 10)[1]
    same = [len(set(a) & set(b)) / 10 for a, b in zip(ids, scanned, strict=True)]
    # Near-ties at the tenth place may fall either way; coarse codes are no unit vectors, so that
    # distances to them rank otherwise.
    assert np.mean(same) > (0.6 if (metric, factory[-4:]) == ("l2", "Q8x4") else 0.98)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_of_many_equal_vectors_in_a_list_the_first_ids_are_found(tmp_path, monkeypatch):
    same = np.repeat(made_up_vectors(5, seed=1)[1:], 600, axis=0)
    embeddings = store_embeddings(tmp_path, same)
    index = faiss_index.train_index("IVF2,SQ8", "inner_product", embeddings, 2400, 2400, 0)
    faiss_index.add_rows(index, embeddings, 0, 2400)
    queries = same[::200].astype(np.float32)
    _, ids = search_by_list(InvertedLists(index), queries, 2, 10)
    first = np.repeat(np.arange(4) * 600, 3)
    np.testing.assert_array_equal(ids, first[:, None] + np.arange(10))
    monkeypatch.setattr(list_search, "_SCORES", 3000)
    np.testing.assert_array_equal(search_by_list(InvertedLists(index), queries, 2, 10)[1], ids)


def flat(embeddings, count):
    index = faiss_index.train_index("Flat", "inner_product", embeddings, count, count, 0)
    faiss_index.add_rows(index, embeddings, 0, count)
    return IndexSearcher(index)


def all_lists(embeddings, count):
    index = faiss_index.train_index("IVF4,Flat", "inner_product", embeddings, count, count, 0)
    faiss_index.add_rows(index, embeddings, 0, count)
    searcher = ListSearcher(InvertedLists(index), 4)
    searcher.score_error = 1e-3
    return searcher


@pytest.mark.parametrize("knows_spans", [True, False])
@pytest.mark.parametrize(
    "kind", [BlockSearcher, lambda *a: TorchSearcher(*a, "cpu"), flat, all_lists]
)
def test_neighbors_among_many_equal_vectors_and_beside_a_long_document_are_exact(
    tmp_path, kind, knows_spans
):
    """Vectors 0..1999 are 5 vectors 400 times each, then comes a document of 1500 chunks."""
    vectors = made_up_vectors(1506, seed=1)[6:]
    vectors = np.concatenate([np.repeat(vectors[:5], 400, axis=0), vectors[:1500]])
    embeddings = store_embeddings(tmp_path, vectors)
    long = np.arange(len(vectors)) >= 2000
    owner = np.where(long, 2000, np.arange(len(vectors))).astype(np.uint64)
    own = lambda i: np.stack([owner[i]] * 2, -1)
    spans = lambda k: np.where((k == 2000)[:, None], [2000, 3500], [0, 0])
    searcher = kind(embeddings, len(vectors))
    finder = NeighborFinder(searcher, embeddings.rows, own, 4, spans if knows_spans else None)
    queries = np.asarray([3, 700, 1999, 2000, 2600, 3400])
    found, scores = finder.find(vectors[queries], K, finder.keys(queries))
    for query, ids, own_scores in zip(queries, found, scores, strict=True):
        exact = vectors.astype(np.float64) @ vectors[query].astype(np.float64)
        exact[(owner == owner[query]) | ~vectors.any(axis=1)] = -np.inf
        expected = np.lexsort((np.arange(len(vectors)), -exact))[:K]
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_array_equal(own_scores, exact[expected])


@pytest.mark.parametrize("factory", ["IVF16,SQ8", "IVF16,RaBitQ", "IVF16,PQ8x4"])
def test_a_query_finds_the_same_in_any_batch(embeddings, vectors, factory):
    searcher = ListSearcher(InvertedLists(build(embeddings, factory)), 4)
    ids = np.flatnonzero(vectors.any(axis=1))
    whole, scores = find(searcher, embeddings, ids)
    for size in (1, 7, 400):
        part = ids[3 : 3 + size]
        again, again_scores = find(searcher, embeddings, part)
        np.testing.assert_array_equal(again, whole[3 : 3 + size])
        np.testing.assert_array_equal(again_scores, scores[3 : 3 + size])


def test_lists_are_chosen_by_product_and_ties_by_number(embeddings, vectors):
    lists = InvertedLists(build(embeddings, "IVF16,SQ8"))
    queries = vectors[vectors.any(axis=1)][:200].astype(np.float32)
    chosen = lists.assign(queries, 5)
    assert lists.centroids is not None
    products = queries @ lists.centroids.T
    taken = np.take_along_axis(products, chosen, 1)
    assert (np.diff(taken, axis=1) <= 1e-3).all()
    np.put_along_axis(products, chosen, -np.inf, 1)
    assert (products.max(axis=1) <= taken.min(axis=1) + 1e-3).all()
    np.testing.assert_array_equal(
        np.concatenate([lists.assign(q[None], 5) for q in queries]), chosen
    )
    everything = lists.assign(np.zeros((1, queries.shape[1]), np.float32), 99)
    assert everything.tolist() == [list(range(16))]


def test_vectors_are_added_to_the_list_that_a_query_for_them_visits_first(embeddings, vectors):
    lists = InvertedLists(build(embeddings, "IVF16,SQ8"))
    for number in range(16):
        ids, decoded = lists.read(number)
        assert (lists.assign(vectors[ids].astype(np.float32), 1) == number).all()
        np.testing.assert_allclose(decoded, vectors[ids], atol=0.05)


def test_all_lists_visited_is_nearly_exact_search(embeddings, vectors):
    searcher = ListSearcher(InvertedLists(build(embeddings, "IVF16,SQ8")), 16)
    ids = np.flatnonzero(vectors.any(axis=1))
    found, _ = find(searcher, embeddings, ids)
    assert (found == brute_force(vectors, ids, K)).mean() > 0.999


def test_more_neighbors_than_the_lists_hold_end_in_minus_one(embeddings, vectors):
    searcher = ListSearcher(InvertedLists(build(embeddings, "IVF200,SQ8")), 1)
    found, scores = find(searcher, embeddings, np.arange(20), k=60)
    assert (found[:, -1] == -1).any()
    assert ((found < 0) == (scores == -np.inf)).all()


def test_parts_of_an_index_give_what_the_whole_gives(embeddings, vectors):
    ids = np.flatnonzero(vectors.any(axis=1))[:300]
    whole = find(IndexSearcher(build(embeddings, "Flat")), embeddings, ids)
    parts = [
        find(IndexSearcher(build(embeddings, "Flat", start=a, stop=b)), embeddings, ids)
        for a, b in ((0, 700), (700, 710), (710, COUNT))
    ]
    for expected, found in zip(whole, best_of(parts), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_mapped_file_gives_what_memory_gives(embeddings, vectors, tmp_path):
    index = build(embeddings, "IVF16,SQ8")
    faiss_index.write_index(index, tmp_path / "a")
    ids = np.flatnonzero(vectors.any(axis=1))[:100]
    expected = find(ListSearcher(InvertedLists(index), 4), embeddings, ids)[0]
    opened = open_searcher(tmp_path / "a", 4, "cpu")
    assert isinstance(opened, ListSearcher)
    np.testing.assert_array_equal(find(opened, embeddings, ids)[0], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_exact_search_on_cuda_finds_what_the_cpu_finds(embeddings, vectors):
    ids = np.flatnonzero(vectors.any(axis=1))
    found, _ = find(TorchSearcher(embeddings, COUNT, "cuda"), embeddings, ids)
    np.testing.assert_array_equal(found, brute_force(vectors, ids, K))


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(faiss, "StandardGpuResources"), reason="needs faiss-gpu")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_lists_on_a_gpu_find_what_the_cpu_finds(embeddings, vectors, tmp_path):
    index = build(embeddings, "IVF16,SQ8")
    faiss_index.write_index(index, tmp_path / "a")
    ids = np.flatnonzero(vectors.any(axis=1))
    expected = find(ListSearcher(InvertedLists(index), 4), embeddings, ids)[0]
    found = find(open_searcher(tmp_path / "a", 4, "cuda:0"), embeddings, ids)[0]
    assert (found == expected).mean() > 0.99


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this Faiss has a GPU part")
def test_lists_on_a_gpu_without_a_gpu_faiss_are_refused(embeddings, tmp_path):
    faiss_index.write_index(build(embeddings, "IVF16,SQ8"), tmp_path / "a")
    with pytest.raises(IndexBuildError, match="no GPU part; install faiss-gpu"):
        open_searcher(tmp_path / "a", 4, "cuda:0")


@pytest.mark.parametrize(
    ("factory", "message"),
    [("HNSW16,Flat", "a graph cannot be built in shards"), ("IVF16,Nonsense", "not one of Faiss")],
)
def test_factories_that_cannot_be_built_are_refused(embeddings, factory, message):
    with pytest.raises(IndexBuildError, match=message):
        build(embeddings, factory)
