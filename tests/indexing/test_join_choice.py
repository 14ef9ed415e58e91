"""Which neighbors are kept, and the parts of map and documents that this is read from."""

import numpy as np
import pytest

from etl.storage import StageFolder, StoredFile
from indexing.join_choice import DocumentKeys, MapRows, kept_neighbors, store_documents
from indexing.knn_map import KNNMapError


@pytest.mark.parametrize("keep", [1, 3, 6])
def test_the_first_that_share_no_key_and_no_cluster_are_kept(keep):
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, 90, (5, 4, 6))
    keys = rng.integers(0, 40, (5, 4, 6, 2)).astype(np.uint64)
    own = rng.integers(0, 40, (5, 4, 2)).astype(np.uint64)
    found = kept_neighbors(ids, keys, own, keep)
    reasons = set()
    for sample, chunk in np.ndindex(5, 4):
        held = {int(key) for key in own[sample].ravel()}
        allowed = []
        for i, (key, cluster) in zip(ids[sample, chunk], keys[sample, chunk], strict=True):
            reasons.add((i < 0, int(key) in held, int(cluster) in held))
            if i >= 0 and int(key) not in held and int(cluster) not in held:
                allowed.append(i)
        assert found[sample, chunk].tolist() == (allowed + [-1] * keep)[:keep]
    assert {(False, True, False), (False, False, True), (True, False, False)} <= reasons


def tables(data, folder):
    stage, count = StageFolder(str(folder)), len(data.retrieval.manifest.shards)
    records = [store_documents(stage, f"part-{i}", data.retrieval, i) for i in range(count)]
    return stage, [StoredFile(**record["files"]["table"]) for record in records]


def test_document_tables_give_the_keys_of_every_chunk(data, tmp_path):
    stage, files = tables(data, tmp_path)
    assert len(files) == 3
    ids = np.random.default_rng(0).permutation(data.retrieval.num_chunks)
    found = DocumentKeys(stage, files, data.retrieval).of(ids.reshape(-1, 1))
    assert np.array_equal(found[:, 0], data.retrieval.chunk_keys(ids))


def test_ids_that_the_retrieval_dataset_does_not_hold_are_refused(data, tmp_path):
    keys = DocumentKeys(*tables(data, tmp_path), data.retrieval)
    assert keys.of(np.empty(0, np.int64)).shape == (0, 2)
    for wrong in (-1, data.retrieval.num_chunks):
        with pytest.raises(KNNMapError, match=f"{data.retrieval.num_chunks - 1}"):
            keys.of(np.asarray([0, wrong]))


def test_rows_of_a_map_are_those_of_the_whole_map(data):
    rows, whole = MapRows(data.map), data.map.load()
    assert (rows.k, rows.rows, rows.chunk_start) == (whole.k, whole.rows, 0)
    for start, stop in ((0, 1), (3, 9), (0, whole.rows), (whole.rows - 2, whole.rows + 5)):
        assert np.array_equal(rows.read(start, stop), whole.neighbors[start:stop])
    assert rows.read(whole.rows + 1, whole.rows + 3).shape == (0, whole.k)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"KNNRETM\x00\x01" + raw[9:], "expected b'KNNRETM"),
        (lambda raw: raw[:9] + b"\x02" + raw[10:], "version 1"),
        (lambda raw: raw[:-8], "its header promises"),
        (lambda raw: raw + bytes(8), "its header promises"),
        (lambda raw: raw[:20], "starts with"),
    ],
)
def test_a_damaged_map_is_refused(data, tmp_path, change, message):
    file = StoredFile(**data.map.manifest["files"]["map"])
    (tmp_path / file.name).write_bytes(change(data.map.load().path.read_bytes()))
    (tmp_path / "knn.json").write_text("{}")
    damaged = type(data.map)(str(tmp_path), data.map.manifest)
    with pytest.raises(KNNMapError, match=message):
        MapRows(damaged)
