import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from etl.dataset import Dataset
from etl.manifest import NAME, DatasetManifest
from etl.records import Document
from etl.retmmap import HEADER, Layout
from etl.shard_writer import Piece, ShardWriter
from etl.storage import StageFolder, StorageError, create_json
from etl.tokenizer import Encoded
from indexing.knn_map import KNNMapError
from indexing.leaks import REMEDIES, LeakError, scan_map
from tests.small_data import write_map

SIZE, EOD, PAD = 8, 98, 99
# Key, cluster and tokens of each document. NeMo's padding gives one of 16 tokens a chunk of pads.
TRAINING = [(1, 1, 20), (2, 2, 16), (3, 3, 5)]
RETRIEVAL = [(11, 11, 20), (1, 1, 20), (12, 2, 30), (13, 13, 16), (14, 14, 3), (15, 15, 9)]


def write_dataset(folder, split, documents, stride=SIZE):
    """Documents in two shards, by the writers of jobs.prepare_data with NeMo's padding."""
    stage = StageFolder(str(folder / split))
    layout = Layout.of(SIZE, np.uint16, split == "retrieval", stride)
    tokenizer: Any = SimpleNamespace(pad_id=PAD)
    shards = []
    for i, part in enumerate((documents[:2], documents[2:])):
        scratch = folder / f"scratch-{split}-{i}"
        writer = ShardWriter(scratch, layout, tokenizer, None, True, ["a.jsonl"])
        for key, cluster, length in part:
            ids = np.full(length, key, np.uint16)
            ids[-1] = EOD
            content_hash = np.asarray([key, 0], "<u8").tobytes()
            document = Document(0, 100 * key, "", content_hash, length)
            writer.add([Piece(document, Encoded(ids, np.ones(length, int)), cluster)])
        shards.append(writer.store(stage, f"shard-{i}"))
    (folder / "tokenizer.json").write_text("{}")
    [stored] = stage.store("tokenizer", folder / "tokenizer.json")
    manifest = DatasetManifest(
        split=split,
        chunk_size=SIZE,
        stride=stride,
        dtype_code=layout.dtype_code,
        pad_id=PAD,
        eod_id=EOD,
        eod_token="<|endoftext|>",
        vocab_size=100,
        tokenizer=stored,
        tokenizer_fingerprint="none",
        encoder=None,
        split_rule={},
        held_back=0,
        sources=("a.jsonl",),
        shards=tuple(shards),
    )
    create_json(stage.path_of(NAME), manifest.to_json())
    return Dataset(stage.url)


def chunk_of(dataset, key, number=0):
    return int(dataset.chunk_spans(np.asarray([key], np.uint64))[0, 0]) + number


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("training"), "train", TRAINING)


@pytest.fixture(scope="module", params=[SIZE, SIZE // 4], ids=["stride=size", "stride<size"])
def retrieval(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    return write_dataset(folder, "retrieval", RETRIEVAL, request.param)


def clean_ids(training, retrieval):
    """Three neighbors a chunk, of all documents that are allowed; the last is missing."""
    allowed = np.concatenate(
        [
            np.arange(*retrieval.chunk_spans(np.asarray([key], np.uint64))[0])
            for key in (11, 13, 14, 15)
        ]
    )
    allowed = allowed[~retrieval.is_all_pad(allowed)]
    ids = np.resize(allowed, (training.num_chunks, 3))
    ids[:, 2] = -1
    ids[training.is_all_pad(np.arange(training.num_chunks))] = -1
    return ids


def only(**expected):
    return {**dict.fromkeys(REMEDIES, 0), **expected}


def test_a_clean_map_has_no_leaks(training, retrieval, tmp_path):
    ids = clean_ids(training, retrieval)
    found = scan_map(training, retrieval, write_map(tmp_path, training, retrieval, ids))
    assert (found.counts, found.total, found.examples) == (only(), 0, {})
    assert (found.chunks, found.slots) == (len(ids), ids.size)
    assert found.neighbors == (ids >= 0).sum()
    found.check()


def plant(kind, training, retrieval, ids):
    """Two leaks of one kind in ids; returns the first's chunk, and its document's place."""
    first, third = chunk_of(training, 1), chunk_of(training, 1, 2)
    if kind == "own_document":
        ids[first, 2] = ids[third, 1] = chunk_of(retrieval, 1)
        return first, "a.jsonl at byte 100)"
    if kind == "near_duplicate":
        second = chunk_of(training, 2)
        ids[second, :2] = chunk_of(retrieval, 12), chunk_of(retrieval, 12, 1)
        return second, "a.jsonl at byte 1200)"
    if kind == "out_of_range":
        ids[first, 2], ids[third, 0] = retrieval.num_chunks, 2**40
        return first, "a.jsonl at byte 100)"
    if kind == "all_pad_neighbor":
        last = int(retrieval.chunk_spans(np.asarray([13], np.uint64))[0, 1]) - 1
        ids[first, 0] = ids[third, 2] = last
        return first, "a.jsonl at byte 1300)"
    pads = chunk_of(training, 2, 2)
    ids[pads, 1:] = chunk_of(retrieval, 11)
    return pads, "a.jsonl at byte 200)"


PLANTED = ["own_document", "near_duplicate", "out_of_range", "all_pad_neighbor", "all_pad_chunk"]


@pytest.mark.parametrize("block", [1, 1 << 13])
@pytest.mark.parametrize("kind", PLANTED)
def test_planted_leaks_are_counted_exactly(training, retrieval, tmp_path, kind, block):
    ids = clean_ids(training, retrieval)
    chunk_id, place = plant(kind, training, retrieval, ids)
    built = write_map(tmp_path, training, retrieval, ids)
    found = scan_map(training, retrieval, built, block=block)
    assert found.counts == only(**{kind: 2})
    assert found.total == 2
    assert list(found.examples) == [kind]
    assert found.examples[kind].chunk_id == chunk_id
    with pytest.raises(LeakError, match=f"2 leaks in .* {kind}: 2, the first is") as error:
        found.check()
    assert f"of chunk {chunk_id} (" in str(error.value)
    assert place in str(error.value)
    assert REMEDIES[kind] in str(error.value)
    assert json.loads(json.dumps(found.json))["total"] == 2


def test_held_out_documents_and_their_clusters_are_no_neighbors(training, retrieval, tmp_path):
    """Of the dataset itself and of one that is passed in: key 13 and the cluster of 12 there."""
    ids = clean_ids(training, retrieval)
    ids[0, 2] = chunk_of(retrieval, 12)
    from_13 = int(np.isin(ids, np.arange(chunk_of(retrieval, 13), chunk_of(retrieval, 14))).sum())
    built = write_map(tmp_path, training, retrieval, ids)
    assert from_13 > 0
    assert scan_map(training, retrieval, built).total == 0
    others = write_dataset(tmp_path, "train", [(13, 40, 9), (41, 41, 9), (42, 2, 9)])
    found = scan_map(training, retrieval, built, [others])
    assert found.counts == only(held_out=from_13 + 1)
    with pytest.raises(LeakError, match="held_out"):
        found.check()
    validation = write_dataset(tmp_path, "validation", TRAINING)
    built = write_map(tmp_path / "validation-map", validation, retrieval, ids)
    # Chunk 0 has a neighbor of the cluster of the second held-out document, not of its own.
    assert scan_map(validation, retrieval, built).counts == only(held_out=1)


def test_own_documents_are_counted_but_allowed_in_a_map_made_with_them(
    training, retrieval, tmp_path
):
    ids = clean_ids(training, retrieval)
    plant("own_document", training, retrieval, ids)
    plant("near_duplicate", training, retrieval, ids)
    kept = write_map(tmp_path / "kept", training, retrieval, ids, remove_duplicate=False)
    found = scan_map(training, retrieval, kept)
    assert found.counts == only(own_document=2, near_duplicate=2)
    assert (found.total, found.permitted) == (0, ("own_document", "near_duplicate"))
    found.check()
    built = write_map(tmp_path / "removed", training, retrieval, ids, remove_duplicate=True)
    assert scan_map(training, retrieval, built).total == 4
    # A held-out dataset's own documents leak however the map was made.
    validation = write_dataset(tmp_path, "validation", TRAINING)
    kept = write_map(tmp_path / "held-out", validation, retrieval, ids, remove_duplicate=False)
    with pytest.raises(LeakError, match=r"4 leaks .* held_out: 4"):
        scan_map(validation, retrieval, kept).check()


def damaged_copy(retrieval, folder, suffix, damage):
    """The retrieval dataset with bytes of its first shard changed, under the same manifest."""
    url = shutil.copytree(retrieval.url, folder / "damaged")
    entry = getattr(retrieval.manifest.shards[0], suffix)
    path = Path(url, entry.name)
    raw = bytearray(path.read_bytes())
    damage(raw)
    path.chmod(0o600)
    path.write_bytes(raw)
    return Dataset(str(url))


@pytest.mark.parametrize("place", [20, 26, 31], ids=["first", "continuation", "last"])
def test_tokens_behind_a_document_are_cross_document_leaks(training, retrieval, tmp_path, place):
    """A text token in the pads after the 20 tokens of document 11 is seen by the chunks whose
    window reaches it."""
    ids = clean_ids(training, retrieval)
    ids[0, 2] = chunk_of(retrieval, 1) - 1
    offsets = (ids - chunk_of(retrieval, 11)) * retrieval.manifest.stride
    reaching = (ids >= 0) & (ids < chunk_of(retrieval, 1)) & (offsets + 2 * SIZE > place)
    assert reaching.any()

    def damage(raw):
        raw[2 * place : 2 * place + 2] = (7).to_bytes(2, "little")

    damaged = damaged_copy(retrieval, tmp_path, "bin", damage)
    found = scan_map(training, damaged, write_map(tmp_path, training, retrieval, ids))
    assert found.counts == only(cross_document=int(reaching.sum()))
    with pytest.raises(LeakError, match=r"cross_document: .*a.jsonl at byte 1100"):
        found.check()


def test_a_wrong_chunk_address_is_a_cross_document_leak(training, retrieval, tmp_path):
    """The index sends the second chunk of document 11 to the start of document 1."""
    chunk = chunk_of(retrieval, 11, 1)
    ids = clean_ids(training, retrieval)
    ids[0] = -1, chunk, chunk
    ids[1:][ids[1:] == chunk] = -1
    first = HEADER.size + 20 * retrieval.manifest.shards[0].num_documents

    def damage(raw):
        address = int(retrieval.shard(0)[0].addresses[1])
        raw[first + 8 * chunk : first + 8 * chunk + 8] = address.to_bytes(8, "little")

    damaged = damaged_copy(retrieval, tmp_path, "idx", damage)
    found = scan_map(training, damaged, write_map(tmp_path, training, retrieval, ids))
    assert found.counts == only(cross_document=2)


def test_a_part_of_the_chunks_is_scanned(training, retrieval, tmp_path):
    """Also in a map that starts later than the dataset."""
    ids = clean_ids(training, retrieval)
    plant("own_document", training, retrieval, ids)
    start, third = 1, chunk_of(training, 1, 2)
    built = write_map(tmp_path, training, retrieval, ids[start:], start)
    assert scan_map(training, retrieval, built).counts == only(own_document=1)
    part = scan_map(training, retrieval, built, chunk_range=(third, third + 1))
    assert (part.chunks, part.slots, part.total) == (1, 3, 1)
    assert scan_map(training, retrieval, built, chunk_range=(third + 1, len(ids))).total == 0
    assert scan_map(training, retrieval, built, chunk_range=(third, third)).slots == 0
    for outside in ((0, 2), (1, len(ids) + 1), (3, 2)):
        with pytest.raises(KNNMapError, match="chunk_range"):
            scan_map(training, retrieval, built, chunk_range=outside)


def test_a_map_of_other_datasets_or_too_many_rows_is_refused(training, retrieval, tmp_path):
    ids = clean_ids(training, retrieval)
    built = write_map(tmp_path, training, retrieval, ids)
    other = {**built.manifest, "retrieval_fingerprint": "another"}
    with pytest.raises(StorageError, match="another"):
        scan_map(training, retrieval, replace(built, manifest=other))
    long = write_map(tmp_path / "long", training, retrieval, np.concatenate([ids, ids]))
    with pytest.raises(KNNMapError, match="chunks; the map is damaged"):
        scan_map(training, retrieval, long)


def test_counts_of_prepared_data_are_those_of_a_loop(data):
    """The small prepared dataset's map names chunks at random: of their own documents and pads."""
    found = scan_map(data.training, data.retrieval, data.map, block=7)
    expected = only()
    rows = data.map.load().neighbors
    own, retrieval = data.training, data.retrieval
    for chunk_id, row in enumerate(rows.tolist()):
        for neighbor in (n for n in row if n >= 0):
            keys = own.chunk_keys([chunk_id])[0], retrieval.chunk_keys([neighbor])[0]
            expected["own_document"] += int(keys[0][0] == keys[1][0])
            expected["near_duplicate"] += int(keys[0][0] != keys[1][0] and keys[0][1] == keys[1][1])
            expected["all_pad_neighbor"] += int(retrieval.is_all_pad([neighbor])[0])
            expected["all_pad_chunk"] += int(own.is_all_pad([chunk_id])[0])
    assert found.counts == expected
    assert expected["own_document"] > 0
    assert expected["all_pad_neighbor"] > 0
    assert expected["all_pad_chunk"] > 0
    assert found.neighbors == 3 * own.num_chunks
