import shutil
from dataclasses import replace

import numpy as np
import pytest

from etl.storage import StageFolder, StorageError
from indexing.built_index import open_index
from serving.retrieval import LocalRetriever
from tests.serving.offline import EMBEDDER, make_records, prepare_and_index
from tests.serving.word_embedder import WordEmbedder

K = 5


@pytest.fixture(scope="module")
def static(offline, embedder):
    return LocalRetriever(offline.index_url, offline.dataset.url, embedder)


def all_chunks(dataset):
    return dataset.get_chunk(np.arange(dataset.num_chunks), continuation=False).astype(np.int64)


def test_neighbors_are_those_of_a_brute_force_search(static, offline):
    """Queries are the corpus' own chunks, whose vectors are stored."""
    vectors = open_index(offline.index_url).embeddings.rows(np.arange(offline.dataset.num_chunks))
    chunks = all_chunks(offline.dataset)
    found = static.retrieve(chunks, K)
    exact = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    exact[:, ~vectors.any(axis=1)] = -np.inf
    for c in np.flatnonzero(vectors.any(axis=1)):
        scores = [neighbor.score for neighbor in found.found[c]]
        ids = [neighbor.id for neighbor in found.found[c]]
        np.testing.assert_allclose(scores, np.sort(exact[c])[::-1][:K], atol=2e-3)
        np.testing.assert_allclose(scores, exact[c, ids], atol=2e-3)
        assert scores == sorted(scores, reverse=True)


def test_tokens_text_and_source_are_those_of_the_found_chunks(static, offline):
    found = static.retrieve(all_chunks(offline.dataset)[:30], K)
    sources = ("corpus.jsonl, T", "corpus.jsonl")
    for c, neighbors in enumerate(found.found):
        for k, neighbor in enumerate(neighbors):
            [tokens] = offline.dataset.get_chunk([neighbor.id])
            np.testing.assert_array_equal(found.tokens[c, k], tokens)
            np.testing.assert_array_equal(found.mask[c, k], tokens != static.rules.pad_id)
            assert neighbor.text == static.rules.tokenizer.decode_batch(tokens[None])[0]
            assert neighbor.service == "static"
            assert neighbor.source.startswith(sources)


def test_every_document_is_named_by_its_own_record(static, offline):
    """Records are in order, in three shards; every third one has neither title nor id."""
    first = offline.dataset.document_first_chunk[:-1]
    titles = [record.get("title") for record in offline.records]
    expected = ["corpus.jsonl" if t is None else f"corpus.jsonl, {t}" for t in titles]
    assert static.sources(first) == expected


def test_missing_neighbors_are_pads_that_nobody_sees(static, offline):
    many = offline.dataset.num_chunks + 3
    pads = np.full((1, static.rules.chunk_size), static.rules.pad_id)
    chunks = np.concatenate([all_chunks(offline.dataset)[:1], pads])
    found = static.retrieve(chunks, many)
    indexed = open_index(offline.index_url).manifest["vectors"]
    assert [len(neighbors) for neighbors in found.found] == [indexed, 0]
    assert found.tokens.shape == (2, many, 2 * static.rules.chunk_size)
    assert min(neighbor.id for neighbor in found.found[0]) >= 0
    for c, count in enumerate((indexed, 0)):
        assert found.mask[c, :count, 0].all()
        assert not found.mask[c, count:].any()
        assert (found.tokens[c, count:] == static.rules.pad_id).all()
    assert not static.is_empty()
    assert static.pinned() is static


def test_a_text_is_asked_as_the_chunk_of_its_tokens_is(static, offline):
    chunks = all_chunks(offline.dataset)[:20]
    texts = static.rules.tokenizer.decode_batch(chunks)
    assert static.query(texts, K).found == static.retrieve(chunks, K).found


def test_no_chunks_are_no_neighbors(static):
    empty = np.empty((0, static.rules.chunk_size), np.int64)
    assert static.retrieve(empty, K).found == ()


def test_what_cannot_be_asked_is_refused(static):
    with pytest.raises(ValueError, match=r"\[2, 7\], expected \[C, 16\]"):
        static.retrieve(np.zeros((2, 7), np.int64), K)
    with pytest.raises(ValueError, match="neighbors is 0"):
        static.query(["x"], 0)


def test_an_index_of_another_dataset_is_refused(offline, embedder, tokenizer_url, tmp_path):
    other = prepare_and_index(tmp_path, tokenizer_url, make_records(10, seed=1))
    with pytest.raises(StorageError) as error:
        LocalRetriever(other.index_url, offline.dataset.url, embedder)
    for dataset in (offline.dataset, other.dataset):
        assert dataset.manifest.fingerprint in str(error.value)


@pytest.mark.parametrize("other", [replace(EMBEDDER, batch_size=8), WordEmbedder()])
def test_another_embedder_is_refused(offline, other):
    expected = open_index(offline.index_url).manifest["embedder_fingerprint"]
    with pytest.raises(StorageError, match=rf"{expected}\), found .*batch_size$"):
        LocalRetriever(offline.index_url, offline.dataset.url, other)


def test_a_damaged_document_table_is_reported(offline, embedder, tmp_path):
    shutil.copytree(offline.dataset.url, tmp_path / "data")
    static = LocalRetriever(offline.index_url, str(tmp_path / "data"), embedder)
    info = StageFolder(static.dataset.url).fetch(static.dataset.manifest.shards[0].info)
    info.write_bytes(b"x" * info.stat().st_size)
    with pytest.raises(StorageError, match="prepare the data again"):
        static.sources(np.asarray([0]))
