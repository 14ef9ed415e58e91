import numpy as np
import pytest

from etl.storage import StorageError
from model.samples import (
    NeighborReader,
    RandomNeighborReader,
    SampleError,
    SampleReader,
    only_copies,
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


def test_random_neighbors_are_others_and_as_many(data, reader):
    assert reader.retrieval is not None
    random = RandomNeighborReader.open(data.training, data.map, data.retrieval, 2)
    ids = np.arange(data.training.num_chunks)[None]
    mapped, drawn = reader.retrieval.candidates(ids), random.candidates(ids)
    assert np.array_equal(mapped < 0, drawn < 0)
    assert np.mean(mapped == drawn) < 0.5
    assert np.array_equal(drawn, random.candidates(ids))


def test_maps_and_lengths_that_do_not_fit_are_refused(data):
    with pytest.raises(StorageError, match=data.training.manifest.fingerprint):
        NeighborReader.open(data.retrieval, data.map, data.retrieval, 2)
    with pytest.raises(SampleError, match="holds 4"):
        NeighborReader.open(data.training, data.map, data.retrieval, 5)
    with pytest.raises(SampleError, match="not a multiple"):
        SampleReader(data.training, LENGTH + 1)
    with pytest.raises(SampleError, match="retrieval dataset"):
        SampleReader(data.retrieval, LENGTH)


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
