from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from etl.storage import StorageError
from model.copy_warmup import only_copies
from model.samples import (
    NeighborReader,
    SampleError,
    SampleReader,
    split_documents,
)

LENGTH = 64


@pytest.fixture
def reader(data):
    return SampleReader(
        data.training, LENGTH, NeighborReader.open(data.training, data.map, data.retrieval, 2)
    )


def test_samples_are_the_token_stream_in_order(data, reader):
    batch = reader.read(np.arange(reader.num_samples))
    stream = data.training.get_chunk(np.arange(data.training.num_chunks)).ravel()
    assert np.array_equal(batch.tokens.ravel()[: len(stream)], stream)
    assert np.array_equal(batch.labels.ravel()[: len(stream) - 1], stream[1:])


def test_labels_count_inside_one_document_and_never_on_pads(data, reader):
    batch = reader.read(np.arange(reader.num_samples))
    pad, eod = data.training.manifest.pad_id, data.training.manifest.eod_id
    assert not (batch.loss_mask & ((batch.labels == pad) | (batch.tokens == pad))).any()
    assert not (batch.loss_mask & (batch.tokens == eod)).any()
    inside_documents = data.training.manifest.num_tokens - data.training.num_documents
    assert batch.loss_mask.sum() == inside_documents


def test_a_document_that_fills_its_last_chunk_does_not_predict_the_next():
    """No pad stands between the two: this dataset was made without NeMo's."""
    tokens = np.arange(1, 13, dtype=np.uint16).reshape(6, 2)
    dataset = SimpleNamespace(
        url="full",
        chunk_size=2,
        num_chunks=6,
        num_documents=3,
        manifest=SimpleNamespace(split="train", pad_id=0),
        document_first_chunk=np.asarray([0, 1, 4, 6]),
        get_chunk=lambda ids: tokens[ids],
    )
    batch = SampleReader(dataset, 4).read([0, 1, 2])
    assert batch.labels[~batch.loss_mask].tolist() == [3, 9, 0]


def test_no_document_of_the_sample_is_among_its_neighbors(data, reader):
    assert reader.retrieval is not None
    kept = 0
    for number in range(reader.num_samples):
        ids, inside = reader.chunk_ids([number])
        rows, present = np.minimum(ids, data.training.num_chunks - 1)[:, :-1], inside[:, :-1]
        keys = data.training.chunk_keys(rows)
        chosen = reader.retrieval.choose(rows, present, keys)
        found = chosen[chosen >= 0]
        assert not np.isin(data.retrieval.chunk_keys(found), keys).any()
        kept += len(found)
    assert kept > 0


def test_neighbors_are_the_first_allowed_of_the_row_and_missing_ones_are_masked(data, reader):
    assert reader.retrieval is not None
    ids, inside = reader.chunk_ids([0])
    rows, present = ids[:, :-1], inside[:, :-1]
    keys = data.training.chunk_keys(rows)
    chosen = reader.retrieval.choose(rows, present, keys)
    for row, picked in zip(data.map.load().get(rows[0]), chosen[0], strict=True):
        allowed = [i for i in row if i >= 0 and data.retrieval.chunk_keys([i])[0] not in keys]
        assert [i for i in picked if i >= 0] == allowed[:2]
    batch = reader.read([0])
    assert batch.neighbors is not None
    assert batch.neighbors_mask is not None
    missing = chosen < 0
    assert not batch.neighbors_mask[missing].any()
    for place in np.argwhere(~missing):
        expected = data.retrieval.get_chunk([chosen[tuple(place)]])[0]
        assert np.array_equal(batch.neighbors[tuple(place)], expected)


def near_neighbors(data):
    """Rows of seven: other chunks of the same documents and beside them, holes, random ones."""
    rng = np.random.default_rng(3)
    shape, num_chunks = (data.training.num_chunks, 7), data.retrieval.num_chunks
    numbers = np.repeat(*_first_and_count(data.training))
    starts = dict(zip(data.retrieval.document_keys, data.retrieval.document_first_chunk))
    own = [starts.get(key, 0) for key in data.training.document_keys[numbers]]
    ids = (np.asarray(own)[:, None] + rng.integers(-40, 40, shape)) % num_chunks
    ids = np.where(rng.random(shape) < 0.3, rng.integers(0, num_chunks, shape), ids)
    return np.where(rng.random(shape) < 0.1, -1, ids)


def _first_and_count(dataset):
    return np.arange(dataset.num_documents), np.diff(dataset.document_first_chunk)


def first_allowed(row, banned, retrieval, count):
    """The definition: ids whose document has neither its key nor its cluster among the banned."""
    documents = [int(retrieval.chunk_to_doc([i])[0]) if i >= 0 else None for i in row]
    numbers = [
        {int(retrieval.document_keys[d]), int(retrieval.document_clusters[d])}
        for d in documents
        if d is not None
    ]
    existing = [int(i) for i in row if i >= 0]
    allowed = [i for i, own in zip(existing, numbers, strict=True) if not own & banned]
    return [*allowed[:count], *[-1] * (count - len(allowed))]


CLUSTERS = {
    "their own": lambda keys, salt: keys,
    "shared": lambda keys, salt: keys % np.uint64(20),
    "of another input": lambda keys, salt: keys ^ np.uint64(salt),
}


@pytest.mark.parametrize("clusters", CLUSTERS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_neighbors_are_those_that_the_definition_gives(data, monkeypatch, count, clusters):
    for salt, dataset in enumerate((data.training, data.retrieval), 1):
        changed = CLUSTERS[clusters](dataset.document_keys, salt)
        monkeypatch.setitem(dataset.__dict__, "document_clusters", changed)
    rows = near_neighbors(data)
    stub = SimpleNamespace(k=7, get=lambda ids: rows[ids])
    reader = SampleReader(data.training, LENGTH, NeighborReader(stub, data.retrieval, count))
    batch = reader.read(np.arange(reader.num_samples))
    size, pad = data.training.chunk_size, data.retrieval.manifest.pad_id
    short = 0
    for sample in range(reader.num_samples):
        chunks = range(sample * LENGTH // size, (sample + 1) * LENGTH // size)
        chunks = [i for i in chunks if i < data.training.num_chunks]
        documents = np.unique(data.training.chunk_to_doc(chunks))
        tables = data.training.document_keys, data.training.document_clusters
        banned = {int(table[d]) for table in tables for d in documents}
        for place, i in enumerate(chunks):
            expected = first_allowed(rows[i], banned, data.retrieval, count)
            short += expected != rows[i, :count].tolist()
            tokens = data.retrieval.get_chunk(np.maximum(expected, 0)).astype(np.int64)
            tokens[np.asarray(expected) < 0] = pad
            assert np.array_equal(batch.neighbors[sample, place], tokens)
        assert (batch.neighbors[sample, len(chunks) :] == pad).all()
    assert 0 < short < data.training.num_chunks
    assert np.array_equal(batch.neighbors_mask, batch.neighbors != pad)


def test_a_map_of_chunks_that_are_not_there_is_refused(data):
    count = data.retrieval.num_chunks
    stub = SimpleNamespace(k=2, get=lambda ids: np.full((*ids.shape, 2), count))
    reader = SampleReader(data.training, LENGTH, NeighborReader(stub, data.retrieval, 2))
    with pytest.raises(IndexError, match=f"{count}; the dataset holds 0..{count - 1}"):
        reader.read([0])


def test_maps_and_lengths_that_do_not_fit_are_refused(data):
    with pytest.raises(StorageError, match=data.training.manifest.fingerprint):
        NeighborReader.open(data.retrieval, data.map, data.retrieval, 2)
    with pytest.raises(SampleError, match="holds 4"):
        NeighborReader.open(data.training, data.map, data.retrieval, 5)
    with pytest.raises(SampleError, match="expected multiples"):
        SampleReader(data.training, LENGTH + 1)
    with pytest.raises(SampleError, match="retrieval dataset"):
        SampleReader(data.retrieval, LENGTH)


def test_samples_of_some_documents_are_their_tokens_alone(data):
    first_chunk, pad = data.training.document_first_chunk, data.training.manifest.pad_id
    bounds = [*range(0, data.training.num_documents, 3), data.training.num_documents]
    text = 0
    for part in pairwise(bounds):
        reader = SampleReader(data.training, LENGTH, documents=part)
        batch = reader.read(np.arange(reader.num_samples))
        chunks = np.arange(first_chunk[part[0]], first_chunk[part[1]])
        stream = data.training.get_chunk(chunks).ravel()
        assert np.array_equal(batch.tokens.ravel()[: len(stream)], stream)
        assert np.array_equal(batch.labels.ravel()[: len(stream) - 1], stream[1:])
        assert (batch.labels.ravel()[len(stream) - 1 :] == pad).all()
        assert reader.num_samples == -(-(len(stream) - 1) // LENGTH)
        text += batch.loss_mask.sum()
    assert text == data.training.manifest.num_tokens - data.training.num_documents


def test_neighbors_of_some_documents_are_those_of_their_chunks(data, reader):
    """Whole samples into the dataset, so that the samples hold the same documents."""
    starts = data.training.document_first_chunk[:-1] * data.training.chunk_size
    first = int(np.flatnonzero((starts > 0) & (starts % LENGTH == 0))[0])
    part = SampleReader(
        data.training, LENGTH, reader.retrieval, (first, data.training.num_documents)
    )
    skipped = starts[first] // LENGTH
    ours, whole = part.read([0, 1]), reader.read([skipped, skipped + 1])
    for name in ("tokens", "labels", "loss_mask", "neighbors", "neighbors_mask"):
        assert np.array_equal(getattr(ours, name), getattr(whole, name)), name


def test_a_reader_without_documents_is_refused(data):
    count = data.training.num_documents
    for part in ((3, 3), (4, 3), (-1, 3), (0, count + 1)):
        with pytest.raises(SampleError, match=f"documents {part[0]} to {part[1]}.*{count} there"):
            SampleReader(data.training, LENGTH, documents=part)


@pytest.mark.parametrize("separator", [",", "/"])
def test_parts_of_a_split_are_all_documents_by_their_weights(separator):
    for weights in ([980, 10, 10], [1, 1, 1], [0.5, 0.25, 0.25], [0, 1, 1], [1, 0, 0]):
        for count in (1, 2, 3, 10, 1001):
            parts = split_documents(separator.join(map(str, weights)), count)
            assert parts[0][0] == 0
            assert parts[2][1] == count
            assert [parts[0][1], parts[1][1]] == [parts[1][0], parts[2][0]]
            for weight, (first, stop) in zip(weights, parts):
                assert 0 <= first <= stop
                assert abs(stop - first - weight / sum(weights) * count) <= 2


def test_halves_of_documents_go_to_the_even_bound_and_what_is_left_to_all():
    assert split_documents("1,1,2", 2) == ((0, 1), (1, 1), (1, 2))
    assert split_documents("1,3,0", 10) == ((0, 2), (2, 10), (10, 10))


@pytest.mark.parametrize("bad", ["", "1,2", "1,1,1,1", "1,2,x", "-1,1,1", "0,0,0", "nan,1,1"])
def test_weights_that_split_nothing_are_refused(bad):
    with pytest.raises(SampleError, match=f"splits_string is '{bad}'; expected three weights"):
        split_documents(bad, 10)


def test_copies_are_labels_in_a_neighbor_of_the_last_completed_chunk(reader):
    whole = reader.read(np.arange(reader.num_samples))
    copies = only_copies(whole).loss_mask
    size = whole.neighbors.shape[-1] // 2
    for b, i in np.ndindex(copies.shape):
        chunk = (i + 1) // size - 1
        held = set()
        if chunk >= 0:
            held = set(whole.neighbors[b, chunk][whole.neighbors_mask[b, chunk]].tolist())
        assert copies[b, i] == (whole.loss_mask[b, i] and whole.labels[b, i] in held)
    assert 0 < copies.sum() < whole.loss_mask.sum()
