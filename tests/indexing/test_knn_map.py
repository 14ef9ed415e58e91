import io

import numpy as np
import pytest

from indexing.knn_map import HEADER, KNNMap, KNNMapError, merge, write_knn_map


def write(path, rows, chunk_start=0):
    with open(path, "wb") as file:
        write_knn_map(file, np.asarray(rows, np.int64), chunk_start)
    return KNNMap(path)


def test_rows_are_found_by_chunk_id(tmp_path):
    opened = write(tmp_path / "a", [[1, 2], [3, -1]], chunk_start=10)
    assert opened.get([11, 10]).tolist() == [[3, -1], [1, 2]]
    for outside in (9, 12):
        with pytest.raises(IndexError, match=r"10\.\.11"):
            opened.get([outside])


def test_ids_beyond_32_bits_survive(tmp_path):
    big = 2**40 + 7
    opened = write(tmp_path / "a", [[big]], chunk_start=big)
    assert opened.get([big]).tolist() == [[big]]


@pytest.mark.parametrize(
    ("starts", "message"), [((0, 3), "leave a gap"), ((0, 1), "overlap")], ids=["gap", "overlap"]
)
def test_merge_refuses_ranges_that_do_not_join(tmp_path, starts, message):
    parts = [write(tmp_path / str(i), [[1], [2]], start) for i, start in enumerate(starts)]
    with pytest.raises(KNNMapError, match=message):
        merge(parts, io.BytesIO())


def test_merge_refuses_nothing_and_other_k(tmp_path):
    with pytest.raises(KNNMapError, match="nothing to merge"):
        merge([], io.BytesIO())
    with pytest.raises(KNNMapError, match="expected one K"):
        merge([write(tmp_path / "a", [[1]]), write(tmp_path / "b", [[1, 2]], 1)], io.BytesIO())


@pytest.mark.parametrize("cut", [-1, 8, 30])
def test_reader_refuses_files_of_another_length(tmp_path, cut):
    write(tmp_path / "a", [[1, 2]])
    raw = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(raw[:cut])
    with pytest.raises(KNNMapError, match="truncated"):
        KNNMap(tmp_path / "a")
    (tmp_path / "a").write_bytes(raw + b"\0")
    with pytest.raises(KNNMapError, match="over-long"):
        KNNMap(tmp_path / "a")


@pytest.mark.parametrize(
    ("offset", "message"), [(0, "not a KNN map"), (9, "version"), (17, "K is 0")]
)
def test_reader_refuses_a_damaged_header(tmp_path, offset, message):
    write(tmp_path / "a", [[1]])
    raw = bytearray((tmp_path / "a").read_bytes())
    raw[offset] = 0 if offset == 17 else 77
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(KNNMapError, match=message):
        KNNMap(tmp_path / "a")


@pytest.mark.parametrize("rows", [[[-2]], [[0.5]], [1]])
def test_writer_refuses_what_is_no_map(rows):
    with pytest.raises(KNNMapError):
        write_knn_map(io.BytesIO(), np.asarray(rows))


def test_ids_beyond_the_retrieval_dataset_are_found_out(tmp_path):
    opened = write(tmp_path / "a", [[5]])
    opened.check_ids(6)
    with pytest.raises(KNNMapError, match=r"-1\.\.4"):
        opened.check_ids(5)
    assert HEADER.size == 41
