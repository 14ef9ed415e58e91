from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from scipy.stats import skew

from indexing.built_index import BuiltIndex
from indexing.overlap import longest_common_runs
from indexing.quality import hubness, measure
from indexing.quality_findings import findings
from indexing.quality_rows import ORIGINS, TableWriter
from indexing.quality_search import (
    Judged,
    QualityOptions,
    recall_curve,
    self_search,
    wilson,
)
from indexing.quality_tables import (
    GroupSizes,
    Tables,
    affinity,
    check_backend,
    equal_chunks,
    expected_affinity,
    in_degrees,
)
from tests.indexing.judged_index import (
    DIMENSION,
    K,
    build_index,
    judged_vectors,
    plant,
    script_chunk,
)
from tests.indexing.made_up_vectors import brute_force
from tests.small_data import write_map

HAS_CUDF = find_spec("cudf") is not None and find_spec("dask_cudf") is not None
BACKENDS = [
    "pandas",
    pytest.param("cudf", marks=pytest.mark.skipif(not HAS_CUDF, reason="needs RAPIDS")),
]
CHUNKS, DOCUMENTS, QUERIES, SLOT_ROWS = 2000, 150, 120, 5000


@pytest.fixture(scope="module")
def planted(tokenizer_url, tmp_path_factory):
    return plant(tmp_path_factory.mktemp("planted"), tokenizer_url)


def judged_of(planted, with_map=True, **options):
    data, index = planted
    training, built = (data.training, data.map) if with_map else (None, None)
    return Judged(index, data.retrieval, training, built, "cpu", QualityOptions(K, **options))


@pytest.fixture(scope="module")
def report(planted, tmp_path_factory):
    return measure(judged_of(planted), tmp_path_factory.mktemp("scratch"))


def random_columns():
    """Tables of whole numbers with several documents a cluster, file, folder."""
    rng = np.random.default_rng(7)
    origins = rng.integers(0, [40, 12, 3], (DOCUMENTS + QUERIES, 3))
    clusters = rng.integers(0, 90, DOCUMENTS + QUERIES)
    documents = {
        name: {
            "document": np.arange(count),
            "cluster": clusters[first : first + count],
            **{o: origins[first : first + count, i] for i, o in enumerate(ORIGINS)},
        }
        for name, first, count in (
            ("documents", 0, DOCUMENTS),
            ("query_documents", DOCUMENTS, QUERIES),
        )
    }
    chunks = {
        "chunk": np.arange(CHUNKS),
        "document": np.sort(rng.integers(0, DOCUMENTS, CHUNKS)),
        "tokens_hash": rng.integers(-900, 900, CHUNKS),
        "vector_hash": rng.integers(-500, 500, CHUNKS),
        "has_text": (rng.random(CHUNKS) < 0.9).astype(np.int64),
        "is_found": (rng.random(CHUNKS) < 0.8).astype(np.int64),
    }
    neighbor = np.minimum(rng.geometric(0.01, SLOT_ROWS), CHUNKS - 1)
    slots = {
        "query": rng.integers(0, 500, SLOT_ROWS),
        "query_document": rng.integers(0, QUERIES, SLOT_ROWS),
        "neighbor": neighbor,
        "neighbor_document": chunks["document"][neighbor],
        "run": rng.integers(-1, 20, SLOT_ROWS),
    }
    return {**documents, "chunks": chunks, "slots": slots}


@pytest.fixture(scope="module")
def columns(tmp_path_factory):
    """The tables' columns, and the folder where they are written in many files."""
    folder, tables = tmp_path_factory.mktemp("tables"), random_columns()
    for name, table in tables.items():
        rows = len(next(iter(table.values())))
        with TableWriter(folder / name, list(table), rows // 5) as writer:
            for where in np.array_split(np.arange(rows), 20):
                writer.add({key: column[where] for key, column in table.items()})
        assert len(list((folder / name).iterdir())) == 5
    return tables, folder


def plain_shares(tables, where):
    slots, ours, theirs = tables["slots"], tables["query_documents"], tables["documents"]
    q, n = slots["query_document"][where], slots["neighbor_document"][where]
    return {"slots": len(q)} | {o: (ours[o][q] == theirs[o][n]).mean() for o in ORIGINS}


@pytest.mark.parametrize("backend", BACKENDS)
def test_affinity_equals_plain_numpy(columns, backend):
    tables, folder = columns
    run = tables["slots"]["run"]
    found = affinity(Tables(folder, backend), (8, 16))
    for name, where in {"all": run > -2, "run_8": run >= 8, "run_16": run >= 16}.items():
        assert found[name] == pytest.approx(plain_shares(tables, where), abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own_are_banned", [True, False])
def test_expected_affinity_equals_all_pairs(columns, backend, own_are_banned):
    tables, folder = columns
    ours, theirs = tables["query_documents"], tables["documents"]
    candidates = tables["chunks"]["document"][tables["chunks"]["is_found"] == 1]
    expected = dict.fromkeys(ORIGINS, 0.0)
    queries, slots = np.unique(tables["slots"]["query_document"], return_counts=True)
    for query, count in zip(queries, slots, strict=True):
        allowed = candidates
        if own_are_banned:
            allowed = candidates[theirs["cluster"][candidates] != ours["cluster"][query]]
        for o in ORIGINS:
            expected[o] += (theirs[o][allowed] == ours[o][query]).mean() * count / SLOT_ROWS
    found = expected_affinity(Tables(folder, backend), own_are_banned)
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_degrees_equal_plain_numpy(columns, backend):
    tables, folder = columns
    degrees = np.bincount(tables["slots"]["neighbor"], minlength=CHUNKS)
    found = in_degrees(Tables(folder, backend), CHUNKS, 10)
    sizes, groups = np.unique(degrees[degrees > 0], return_counts=True)
    np.testing.assert_array_equal(found.histogram.sizes, sizes)
    np.testing.assert_array_equal(found.histogram.groups, groups)
    order = np.lexsort((np.arange(CHUNKS), -degrees))[:10]
    assert found.top == list(zip(order.tolist(), degrees[order].tolist(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_chunks_equal_plain_numpy(columns, backend):
    tables, folder = columns
    found = equal_chunks(Tables(folder, backend))
    for name, column, mask in (
        ("tokens", "tokens_hash", "has_text"),
        ("vectors", "vector_hash", "is_found"),
    ):
        values = tables["chunks"][column][tables["chunks"][mask] == 1]
        counts = np.unique(values, return_counts=True)[1]
        sizes, groups = np.unique(counts[counts > 1], return_counts=True)
        np.testing.assert_array_equal(found[name].sizes, sizes)
        np.testing.assert_array_equal(found[name].groups, groups)


def test_hubness_equals_that_of_the_degrees_themselves():
    degrees = np.random.default_rng(0).zipf(1.7, 950).clip(max=400)
    all_degrees = np.concatenate([degrees, np.zeros(77, np.int64)])
    found = hubness(GroupSizes(*np.unique(degrees, return_counts=True)), len(all_degrees))
    assert found["skewness"] == pytest.approx(skew(all_degrees))
    assert found["never_retrieved"] == 77 / len(all_degrees)
    top = np.sort(all_degrees)[::-1][:11]  # 1% of 1027, rounded up
    assert found["top_percent_share"] == pytest.approx(top.sum() / degrees.sum())
    assert sum(chunks for *_, chunks in found["by_power_of_two"]) == len(all_degrees)
    for first, last, chunks in found["by_power_of_two"]:
        assert chunks == ((all_degrees >= first) & (all_degrees <= last)).sum()


def test_wilson_intervals_are_those_of_the_textbook():
    assert wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.72247, 1), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_a_planted_hub_is_found_with_its_exact_degree(planted, report):
    retrieval, neighbors = planted[0].retrieval, planted[0].map.load().neighbors
    hub = script_chunk(retrieval)
    degree = int((neighbors == hub).sum())
    assert degree > 0.9 * len(neighbors)
    first = report["hubness"]["top"][0]
    assert (first["chunk"], first["times"], first["source"]) == (
        hub,
        degree,
        "package1/folder1/file1.txt",
    )
    assert first["text"].startswith("<script>")
    degrees = np.bincount(neighbors[neighbors >= 0], minlength=retrieval.num_chunks)
    assert report["hubness"]["slots"] == degrees.sum()
    assert report["hubness"]["most"] == degree


def test_planted_vectors_and_chunks_are_counted(planted, report):
    retrieval = planted[0].retrieval
    ids = np.arange(retrieval.num_chunks)
    tokens, size = retrieval.get_chunk(ids, continuation=False), retrieval.chunk_bytes(ids)
    counts = np.unique(tokens[size > 0], axis=0, return_counts=True)[1]
    equal = report["chunks"]["equal"]
    assert equal["tokens"]["groups"] == (counts > 1).sum() > 0
    assert equal["tokens"]["chunks"] == counts[counts > 1].sum()
    assert equal["tokens"]["surplus"] == (counts[counts > 1] - 1).sum()
    assert equal["vectors"] == {"groups": 1, "chunks": 2, "surplus": 1, "largest": 2}
    pads, norms = retrieval.is_all_pad(ids).sum(), report["norms"]
    assert report["chunks"]["all_pads"] == pads == 1
    assert report["chunks"]["without_text"] == (size == 0).sum() == 2
    few = ((tokens != retrieval.manifest.pad_id).sum(axis=1) < 8).sum() - pads
    assert report["chunks"]["with_few_tokens"] == few > 0
    flaws = {name: norms[name] for name in ("zero", "zero_with_text", "not_finite", "not_unit")}
    assert flaws == {"zero": pads + 1, "zero_with_text": 1, "not_finite": 0, "not_unit": 2}
    assert norms["quantiles"]["1"] == pytest.approx(2, abs=1e-3)


def test_vectors_that_are_not_finite_are_counted(planted, tmp_path):
    retrieval = planted[0].retrieval
    vectors = judged_vectors(retrieval)
    vectors[-2:, 0] = [np.nan, np.inf]
    index = build_index(tmp_path, retrieval, vectors, indexed=100)
    judged = Judged(index, retrieval, options=QualityOptions(K, queries=20))
    found = measure(judged, tmp_path)
    assert found["norms"]["not_finite"] == 2
    assert found["lists"]["rows"] + found["lists"]["rows_without_text"] == 100


def test_lists_of_a_map_are_counted_and_compared(planted, report):
    data, neighbors = planted[0], planted[0].map.load().neighbors
    rows = np.arange(len(neighbors))
    has_text, filled = data.training.chunk_bytes(rows) > 0, (neighbors >= 0).sum(axis=1)
    lists = report["lists"]
    assert (lists["from"], lists["rows"], lists["k"]) == ("map", has_text.sum(), K)
    assert lists["short"] == (filled[has_text] < K).sum() > 0
    assert lists["without"] == 0
    assert lists["fill_rate"] == filled[has_text].sum() / (has_text.sum() * K)
    assert lists["measured"] == filled.sum()  # all rows are in the sample
    row, slot = np.nonzero(neighbors >= 0)
    chunks = data.training.get_chunk(row, continuation=False)
    others = data.retrieval.get_chunk(neighbors[row, slot])[:, None]
    pads = data.retrieval.manifest.pad_id
    runs = longest_common_runs(chunks, others, chunks != pads, others != pads)
    assert report["affinity"]["run_8"]["slots"] == (runs >= 8).sum() > 0
    ours, theirs = (
        data.training.chunk_to_doc(row),
        data.retrieval.chunk_to_doc(neighbors[row, slot]),
    )
    assert report["affinity"]["all"]["package"] == (ours % 2 == theirs % 2).mean()
    assert report["affinity"]["all"]["folder"] == (ours % 6 == theirs % 6).mean()
    same_file = (ours // 4 == theirs // 4) & (ours % 6 == theirs % 6)
    assert report["affinity"]["all"]["file"] == same_file.mean()


def test_searched_lists_are_the_nearest_chunks_of_other_documents(planted, tmp_path):
    data, index = planted
    found = measure(judged_of(planted, with_map=False), tmp_path)
    vectors = index.embeddings.rows(np.arange(data.retrieval.num_chunks))
    documents = data.retrieval.chunk_to_doc(np.arange(len(vectors)))
    ranked = brute_force(vectors, np.arange(len(vectors)), len(vectors))
    degrees = np.zeros(len(vectors), np.int64)
    for own in np.flatnonzero(vectors.any(axis=1)):
        others = ranked[own][(documents[ranked[own]] != documents[own]) & (ranked[own] >= 0)]
        degrees[others[:K]] += 1
    assert found["lists"]["from"] == "search"
    sizes = [chunks for *_, chunks in found["hubness"]["by_power_of_two"]]
    has_vector = degrees[vectors.any(axis=1)]
    assert sizes[:2] == [(has_vector == 0).sum(), (has_vector == 1).sum()]
    order = np.lexsort((np.arange(len(degrees)), -degrees))[:10]
    top = [(hub["chunk"], hub["times"]) for hub in found["hubness"]["top"]]
    assert top == [(int(i), int(degrees[i])) for i in order]


def test_a_sample_of_the_chunks_is_searched_where_there_are_more(planted, tmp_path):
    found = measure(judged_of(planted, with_map=False, listed=40, queries=10), tmp_path)
    assert found["lists"]["rows"] + found["lists"]["rows_without_text"] == 40
    assert found["lists"]["measured"] <= 10 * K
    assert found["recall"]["queries"] <= 10


def test_a_chunk_that_a_longer_vector_outscores_is_told_from_one_that_is_missed(planted, report):
    vectors = planted[1].embeddings.rows(np.arange(planted[0].retrieval.num_chunks))
    exact = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    is_first = (exact.max(axis=1) == np.diag(exact))[vectors.any(axis=1)]
    own = report["self_search"]
    assert own["outscored"] == (~is_first).sum() > 0
    assert (own["missed"], own["found"]) == (0, is_first.sum())


def test_an_index_of_other_vectors_is_found_out(planted, tmp_path):
    retrieval = planted[0].retrieval
    (tmp_path / "other").mkdir()
    other = build_index(tmp_path / "other", retrieval, judged_vectors(retrieval, 1), "IVF8,Flat")
    stored = build_index(tmp_path, retrieval, judged_vectors(retrieval))
    mixed = BuiltIndex(other.url, {**other.manifest, "embeddings": "../embeddings"})
    options = QualityOptions(K, nprobe=1)
    found = self_search(Judged(mixed, retrieval, options=options))
    assert stored.embeddings.dimension == DIMENSION
    assert found["missed"] > 0.5 * found["queries"]
    assert found["high_95"] < 0.5
    right = self_search(Judged(other, retrieval, options=options))
    assert right["missed"] == 0


def test_scores_are_those_of_the_vectors(planted, report):
    data, index = planted
    vectors = index.embeddings.rows(np.arange(data.retrieval.num_chunks)).astype(np.float64)
    documents = data.retrieval.chunk_to_doc(np.arange(len(vectors)))
    exact = vectors @ vectors.T
    exact[documents[:, None] == documents] = -np.inf
    exact[:, ~vectors.any(axis=1)] = -np.inf
    exact = -np.sort(-exact[vectors.any(axis=1)], axis=1)
    for name, column in (("first", 0), ("kth", K - 1)):
        found = report["scores"][name]
        assert found["count"] == len(exact)
        assert found["quantiles"]["0.5"] == pytest.approx(np.median(exact[:, column]), abs=1e-12)
        assert sum(found["histogram"]["counts"]) == len(exact)


def test_recall_is_measured_by_lists_where_the_manifest_does_not_know(planted, tmp_path):
    retrieval = planted[0].retrieval
    index = build_index(tmp_path, retrieval, judged_vectors(retrieval), "IVF8,Flat")
    judged = Judged(index, retrieval, options=QualityOptions(K))
    assert recall_curve(judged) == index.manifest["recall_by_nprobe"] != []
    bare = BuiltIndex(index.url, {**index.manifest, "recall_by_nprobe": []})
    found = recall_curve(replace(judged, index=bare))
    assert [point["nprobe"] for point in found] == [1, 2, 4, 8]
    assert found[0]["recall_at_k"] < found[-1]["recall_at_k"] == 1


def test_findings_name_what_stands_out(planted, report):
    found = " ".join(findings(report | {"leaks": None}))
    assert "2 have another" in found
    assert "top 1 %" in found
    calm = {
        "leaks": {"total": 0},
        "norms": report["norms"] | {"not_unit": 0},
        "recall": report["recall"],
        "self_search": report["self_search"] | {"share": 1.0},
        "lists": report["lists"] | {"fill_rate": 1.0},
        "hubness": report["hubness"] | {"top_percent_share": 0.05},
        "chunks": report["chunks"] | {"chunks": 10**6},
        "affinity": {"expected": dict.fromkeys(ORIGINS, 0.2), "run_16": {"slots": 0}}
        | {"all": dict.fromkeys(ORIGINS, 0.25)},
    }
    assert findings(calm) == ["Nothing unusual was found."]
    near = calm["affinity"] | {"all": {"file": 0.01, "folder": 0.31, "package": 0.25}}
    [sentence] = findings(calm | {"affinity": near})
    assert "31.00 % from the same folder (random neighbors: 20.00 %)" in sentence
    assert "hold out whole folders" in sentence
    assert findings(calm | {"leaks": {"total": 3}}) == [
        "The map leaks: 3 neighbors that their chunk may not have."
    ]


@pytest.mark.skipif(HAS_CUDF, reason="cuDF is installed")
def test_a_missing_cudf_is_named_with_the_remedy():
    with pytest.raises(ValueError, match="cudf and dask_cudf cannot be imported; install RAPIDS"):
        check_backend("cudf")


@pytest.mark.parametrize("name", ["neighbors", "queries", "listed", "few_tokens"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
        replace(QualityOptions(), **{name: 0})


def test_a_map_without_any_neighbor_is_measured(planted, tmp_path):
    data, index = planted
    nothing = np.full((data.training.num_chunks, K), -1)
    built = write_map(tmp_path, data.training, data.retrieval, nothing)
    judged = Judged(index, data.retrieval, data.training, built, options=QualityOptions(K))
    found = measure(judged, tmp_path)
    assert found["lists"]["without"] == found["lists"]["rows"] > 0
    assert (found["hubness"]["never_retrieved"], found["hubness"]["top"]) == (1, [])
    assert found["affinity"]["all"] == {"slots": 0, "file": 0, "folder": 0, "package": 0}
