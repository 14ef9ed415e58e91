"""The dynamic service: documents added live against the same documents prepared and indexed."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from etl.records import Fields
from serving.chunk_rules import ChunkRules
from serving.live_documents import LimitError, LiveConfig, LiveDocumentError, LiveDocuments
from serving.retrieval import LocalRetriever
from tests.indexing.made_up_vectors import brute_force
from tests.serving.offline import Preparation, make_records, prepare_and_index
from tests.serving.word_embedder import WordEmbedder

K, COUNT = 4, 24
BITS = 2e-3
"""Scores of unit vectors in fp16 whose last bits differ."""


def records_of(*texts):
    return [{"text": text} for text in texts]


@pytest.fixture
def live(rules):
    return LiveDocuments(rules, WordEmbedder())


PREPARATIONS = {
    "defaults": Preparation(),
    "NeMo's padding and overlapping chunks": Preparation(stride=8, nemo_padding=True),
    "no ends of documents, mended text": Preparation(
        append_eod=False, fields=Fields(apply_ftfy=True)
    ),
}


@pytest.fixture(scope="module", params=PREPARATIONS.values(), ids=PREPARATIONS.keys())
def both(request, tokenizer_url, embedder, tmp_path_factory):
    """(static, dynamic) of the same records; the live ones come a few at a time."""
    folder = tmp_path_factory.mktemp("both")
    offline = prepare_and_index(folder, tokenizer_url, make_records(COUNT), request.param)
    static = LocalRetriever(offline.index_url, offline.dataset.url, embedder)
    config = LiveConfig(apply_ftfy=request.param.fields.apply_ftfy)
    live = LiveDocuments(ChunkRules.of_dataset(offline.dataset), embedder, config)
    for start in range(0, COUNT, 5):
        live.add(offline.records[start : start + 5])
    return static, live


def test_live_chunks_are_the_chunks_of_the_prepared_dataset(both):
    static, live = both
    ids = np.arange(static.dataset.num_chunks)
    assert live.num_chunks == len(ids)
    np.testing.assert_array_equal(
        live.pinned().chunks_with_continuations(ids), static.dataset.get_chunk(ids)
    )
    table = static.dataset.documents
    assert [d.num_tokens for d in live.list()] == table["num_tokens"].tolist()
    counts = np.diff(static.dataset.document_first_chunk)
    assert [d.num_chunks for d in live.list()] == counts.tolist()


def test_live_documents_get_the_neighbors_they_would_have_got_offline(both):
    """For every chunk of the corpus and of other texts. Where the score is clear of the ones before
    and after it, the neighbor is the same one."""
    static, live = both
    own = static.dataset.get_chunk(np.arange(static.dataset.num_chunks), continuation=False)
    other = live.rules.chunked([r["text"] for r in make_records(10, seed=9)]).tokens[:, :16]
    chunks = np.concatenate([own, other]).astype(np.int64)
    compared = 0
    for part in np.split(chunks, range(50, len(chunks), 50)):
        compared += number_of_equal_neighbors(static.retrieve(part, K), live.retrieve(part, K))
    assert compared > len(chunks)


def number_of_equal_neighbors(offline, online):
    compared = 0
    for c, (expected, found) in enumerate(zip(offline.found, online.found, strict=True)):
        assert len(expected) == len(found)
        scores = np.asarray([neighbor.score for neighbor in expected])
        np.testing.assert_allclose([n.score for n in found], scores, atol=BITS)
        steps = np.abs(np.diff(scores)) > 2 * BITS
        is_clear = np.append(True, steps) & np.append(steps, False)
        for k in np.flatnonzero(is_clear[: len(scores)]):
            assert found[k].id == expected[k].id
            assert found[k].text == expected[k].text
            np.testing.assert_array_equal(online.tokens[c, k], offline.tokens[c, k])
            np.testing.assert_array_equal(online.mask[c, k], offline.mask[c, k])
            compared += 1
    return compared


def test_text_is_mended_as_preparation_mends_it(both):
    _, live = both
    [document] = [d for d in live.list() if "Mona Lisa" in d.text]
    assert ("doesn't" in document.text) == live.config.apply_ftfy


def test_rules_of_a_dataset_are_those_it_was_prepared_with(both, request):
    options = PREPARATIONS[request.node.callspec.id]
    rules = both[1].rules
    found = (rules.layout.stride, rules.append_eod, rules.nemo_padding)
    assert found == (options.stride, options.append_eod, options.nemo_padding)


def test_search_is_exact_and_ties_are_ordered_by_id(rules):
    """Many equal chunks, and scores so close that single precision does not order them."""
    live = LiveDocuments(rules, WordEmbedder(4))
    generator = np.random.default_rng(0)
    words = ["harbor", "light", "boat", "star", "north"]
    for i in range(12):
        texts = [" ".join(generator.choice(words, 9)) + f" {i}{j}" for j in range(25)]
        live.add(records_of(*texts, f"{i} " + "boat " * 60))
    snapshot = live.pinned()
    ids = np.arange(snapshot.num_chunks)
    found, scores = snapshot.find(snapshot.vectors, 7)
    expected = brute_force(snapshot.vectors, ids, 7, own=False)
    has_text = snapshot.vectors.any(axis=1)
    np.testing.assert_array_equal(found[has_text], expected[has_text])
    assert (scores[has_text][:, :-1] == scores[has_text][:, 1:]).any()


def test_documents_keep_what_their_records_say(live):
    record = {"text": "the boat", "id": 7, "title": "T", "src": "letters", "page": [1, {"a": None}]}
    assert live.add([record, {"text": "a star"}]) == (0, 1)
    first, second = live.list()
    assert (first.text, first.name, first.title, first.src) == ("the boat", "7", "T", "letters")
    assert first.metadata == {"page": [1, {"a": None}]}
    assert first.source == "letters, T"
    assert second.source == "live document 1"
    assert live.list(1, 5) == (second,)
    assert live.get(1) == second
    with pytest.raises(KeyError, match="no live document 2"):
        live.get(2)
    best = live.query(["the boat"], 2).found[0][0]
    assert (best.id, best.service, best.source) == (0, "dynamic", "letters, T")


def test_a_text_is_added_once_unless_the_dataset_keeps_duplicates(live, rules):
    assert live.add(records_of("a", "b", "a")) == (0, 1, 0)
    assert live.add(records_of("c", "b")) == (2, 1)
    assert live.num_documents == 3
    keeping = LiveDocuments(replace(rules, keep_duplicates=True), WordEmbedder())
    assert keeping.add(records_of("a", "b", "a")) == (0, 1, 2)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"body": "x"}, "no field 'text'"),
        ({"text": 3}, "a int, expected a string"),
        ({"text": " \n"}, "is empty"),
        ("text", "a JSON str, expected an object"),
        ({"text": "x", "weight": float("nan")}, "no JSON object"),
        ({"text": "x", "when": object()}, "no JSON object"),
        ({"text": "\ud800"}, "no JSON object"),
    ],
)
def test_records_that_cannot_be_added_leave_nothing_behind(live, record, reason):
    with pytest.raises(LiveDocumentError, match=f"document 1: .*{reason}"):
        live.add([{"text": "good"}, record])
    assert live.is_empty()
    assert live.add([]) == ()


def test_growth_beyond_the_limits_is_refused_whole(rules, tmp_path):
    config = LiveConfig(str(tmp_path / "live"), max_documents=3, max_chunks=5)
    live = LiveDocuments(rules, WordEmbedder(), config)
    live.add(records_of("a", "b"))
    with pytest.raises(LimitError, match="would have 4 documents, but max_documents is 3") as error:
        live.add(records_of("c", "d"))
    assert (error.value.what, error.value.found, error.value.allowed) == ("documents", 4, 3)
    with pytest.raises(LimitError, match="max_chunks is 5"):
        live.add(records_of("boat " * 200))
    assert live.add(records_of("c")) == (2,)
    with pytest.raises(LimitError, match="max_documents is 2"):
        LiveDocuments(rules, WordEmbedder(), replace(config, max_documents=2))


def test_a_pinned_snapshot_does_not_change(live):
    live.add(records_of("the boat", "a light on the water"))
    pinned, chunks = live.pinned(), live.pinned().chunks_with_continuations(np.arange(2))[:, :16]
    before = pinned.retrieve(chunks.astype(np.int64), 3)
    for i in range(50):
        live.add(records_of(f"the boat {i}"))
    last = live.pinned()
    texts = [n.text for n in last.query(["the boat"], 60).found[0]]
    live.reset()
    live.add(records_of("the boat again"))
    assert [n.text for n in last.query(["the boat"], 60).found[0]] == texts
    after = pinned.retrieve(chunks.astype(np.int64), 3)
    assert after.found == before.found
    np.testing.assert_array_equal(after.tokens, before.tokens)
    assert pinned.generation == 1
    assert live.generation == 53
    assert [n.text for n in live.query(["the boat"], 3).found[0]] == ["the boat again"]


def test_queries_do_not_wait_for_an_addition_and_see_all_of_it_or_nothing(rules):
    embedder = WordEmbedder()
    live = LiveDocuments(rules, embedder)
    live.add(records_of("the boat"))
    embedder.open.clear()
    adding = threading.Thread(target=live.add, args=[records_of("boat one", "slow boat", "boat")])
    adding.start()
    assert embedder.waiting.wait(30)
    assert [n.id for n in live.query(["the boat"], 9).found[0]] == [0]
    embedder.open.set()
    adding.join()
    assert sorted(n.id for n in live.query(["the boat"], 9).found[0]) == [0, 1, 2, 3]


def test_additions_from_many_threads_are_all_there_and_every_view_is_consistent(live):
    views = []

    def add(thread):
        for i in range(20):
            [first, second] = live.add(records_of(f"{thread} {i} boat", f"{thread} {i} star"))
            assert second == first + 1
            views.append(live.pinned())

    threads = [threading.Thread(target=add, args=[thread]) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({document.text for document in live.list()}) == 160
    assert [document.id for document in live.list()] == list(range(160))
    for view in views:
        assert len(view.documents) == 2 * view.generation == view.num_chunks
        ids = np.arange(view.num_chunks)
        texts = view.rules.tokenizer.decode_batch(view.chunks_with_continuations(ids))
        assert texts == [document.text for document in view.documents]


def test_a_service_without_documents_is_empty_and_answers(live, rules):
    assert live.is_empty()
    found = live.retrieve(np.zeros((2, rules.chunk_size), np.int64), 3)
    assert found.found == ((), ())
    assert (found.tokens == rules.pad_id).all()
    assert not found.mask.any()
