"""KNN maps against the golden ones."""

import io

import numpy as np
import pytest

from indexing.knn_map import KNNMap, KNNMapError, merge, write_knn_map
from tests.conformance.golden import FOLDER, cases

ROOT = FOLDER / "knn"
CASES = [pytest.param(case, id=case["name"]) for case in cases("knn")]
REFUSED = [pytest.param(case, id=case["name"]) for case in cases("knn", "must_be_refused")]


def written(rows, chunk_start):
    file = io.BytesIO()
    write_knn_map(file, rows, chunk_start)
    return file.getvalue()


@pytest.mark.parametrize("case", CASES)
def test_writer_gives_the_golden_bytes(case):
    golden = np.load(ROOT / case["matrix"])
    assert written(golden["map"], int(golden["chunk_start"])) == (ROOT / case["file"]).read_bytes()
    for shard in case["shards"]:
        rows = golden["map"][shard["row_start"] : shard["row_stop"]]
        assert written(rows, shard["chunk_start"]) == (ROOT / shard["file"]).read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_reader_gives_the_golden_rows(case):
    golden, opened = np.load(ROOT / case["matrix"]), KNNMap(ROOT / case["file"])
    assert (opened.k, opened.rows, opened.chunk_start) == (
        *(case["K"], case["rows"]),
        case["chunk_start"],
    )
    ids = np.arange(opened.rows) + opened.chunk_start
    np.testing.assert_array_equal(opened.get(ids), golden["map"])
    for chunk_id in case["out_of_range_chunk_ids"]:
        with pytest.raises(IndexError):
            opened.get([chunk_id])


@pytest.mark.parametrize("case", CASES)
def test_merge_gives_the_golden_bytes(case):
    file = io.BytesIO()
    merge([KNNMap(ROOT / name) for name in case["merge_input_order"]], file)
    assert file.getvalue() == (ROOT / case["merged"]).read_bytes()


@pytest.mark.parametrize("case", REFUSED)
def test_what_must_be_refused_is(case):
    with pytest.raises(KNNMapError):
        merge([KNNMap(ROOT / name) for name in case.get("merge", [case.get("file")])], io.BytesIO())
