"""Several services as one."""

import threading

import numpy as np
import pytest

from serving.combined import CombinedRetriever
from serving.live_documents import LiveDocuments
from serving.retrieval import LocalRetriever
from tests.serving.offline import make_records, prepare_and_index
from tests.serving.word_embedder import WordEmbedder
from tests.small_data import CHUNK_SIZE

QUERIES = ["the harbor light", "a star at night", "bread and butter"]


def texts_of(neighbors):
    return [[neighbor.text for neighbor in row] for row in neighbors.found]


@pytest.fixture
def make(rules):
    """A service of live documents with these texts."""

    def made(*texts, embedder=None):
        live = LiveDocuments(rules, embedder or WordEmbedder())
        live.add([{"text": text} for text in texts])
        return live

    return made


@pytest.fixture
def halves(make):
    """(one half, other half, both) of documents without duplicates."""
    texts = [record["text"] for record in make_records(30)]
    return make(*texts[::2]), make(*texts[1::2]), make(*texts)


def test_equal_weights_find_what_one_index_over_everything_finds(
    offline, embedder, tokenizer_url, tmp_path
):
    """The first half is indexed, the other added live. The real embedder's last bits differ."""
    half = len(offline.records) // 2
    first = prepare_and_index(tmp_path, tokenizer_url, offline.records[:half])
    static = LocalRetriever(first.index_url, first.dataset.url, embedder)
    live = LiveDocuments(static.rules, embedder)
    live.add(offline.records[half:])
    combined = CombinedRetriever({"static": static, "dynamic": live})
    whole = LocalRetriever(offline.index_url, offline.dataset.url, embedder)
    chunks = offline.dataset.get_chunk(np.arange(50), continuation=False).astype(np.int64)
    expected, found = whole.retrieve(chunks, 4), combined.retrieve(chunks, 4)
    services, equal = set(), 0
    for wanted, row in zip(expected.found, found.found, strict=True):
        scores = [neighbor.score for neighbor in wanted]
        np.testing.assert_allclose([neighbor.score for neighbor in row], scores, atol=2e-3)
        services |= {neighbor.service for neighbor in row}
        equal += [neighbor.text for neighbor in row] == [neighbor.text for neighbor in wanted]
    assert services == {"static", "dynamic"}
    assert equal > 40


def test_a_merge_keeps_tokens_scores_and_order_of_the_best(halves):
    one, other, both = halves
    combined = CombinedRetriever({"one": one, "other": other})
    for k in (1, 4, 200):
        expected, found = both.query(QUERIES, k), combined.query(QUERIES, k)
        scores = [[neighbor.score for neighbor in row] for row in found.found]
        assert scores == [[neighbor.score for neighbor in row] for row in expected.found]
        assert [sorted(row) for row in texts_of(found)] == [sorted(r) for r in texts_of(expected)]
        for c, row in enumerate(found.found):
            decoded = both.rules.tokenizer.decode_batch(found.tokens[c])[: len(row)]
            assert decoded == [neighbor.text for neighbor in row]
            assert not found.mask[c, len(row) :].any()
            assert min(neighbor.id for neighbor in row) >= 0
    assert found.tokens.shape == (3, 200, 2 * CHUNK_SIZE)
    assert (found.mask == (found.tokens != both.rules.pad_id)).all()


@pytest.mark.parametrize("weight", [0.3, 1.7])
def test_neighbors_are_ordered_by_weighted_scores_and_show_their_own(halves, weight):
    one, other, _ = halves
    weights = {"one": 1.0, "other": weight}
    found = CombinedRetriever({"one": one, "other": other}, weights).query(QUERIES, 200)
    seen_negative = False
    for row in found.found:
        ranks = []
        for n in row:
            factor = weights[n.service]
            ranks.append(n.score * factor if n.score >= 0 else n.score / factor)
            seen_negative |= n.score < 0
        assert ranks == sorted(ranks, reverse=True)
    assert seen_negative
    alone = {n.text: n.score for row in other.query(QUERIES[:1], 200).found for n in row}
    assert {n.text: n.score for n in found.found[0] if n.service == "other"} == alone


class ConstantEmbedder(WordEmbedder):
    """All texts are alike; questions are the opposite of them."""

    def embed(self, texts):
        return np.asarray([[-1.0] if "?" in text else [1.0] for text in texts], np.float16)


def test_less_weight_never_ranks_higher_even_below_zero(make):
    embedder = ConstantEmbedder(1)
    services = {"a": make("star", embedder=embedder), "b": make("boat", embedder=embedder)}
    combined = CombinedRetriever(services, {"a": 0.5})
    [row] = combined.query(["?"], 2).found
    assert [(n.service, n.score) for n in row] == [("b", -1.0), ("a", -1.0)]


def test_ties_go_by_service_then_id(make):
    embedder = ConstantEmbedder(1)
    one = make("boat 1", "x", "boat 2", embedder=embedder)
    other = make("boat 3", "boat 4", embedder=embedder)
    [row] = CombinedRetriever({"z": one, "a": other}).query(["boat"], 5).found
    assert [(n.service, n.id) for n in row] == [("z", 0), ("z", 1), ("z", 2), ("a", 0), ("a", 1)]


def test_a_chunk_that_both_hold_is_shown_once_as_the_better_one(make):
    services = {"one": make("the boat", "a star"), "other": make("x", "the boat", "the moon")}
    combined = CombinedRetriever(services)
    [row] = combined.query(["the boat"], 3).found
    assert (row[0].service, row[0].text) == ("one", "the boat")
    assert len({n.text for n in row}) == len(row) == 3
    combined.set_weights({"other": 2})
    [row] = combined.query(["the boat"], 3).found
    assert (row[0].service, row[0].id) == ("other", 1)
    assert [n.text for n in row].count("the boat") == 1


def test_a_service_without_weight_is_not_asked(make):
    asked = make("the boat", "a star")
    embedder = WordEmbedder()
    ignored = make("the boat", embedder=embedder)
    combined = CombinedRetriever({"ignored": ignored, "asked": asked}, {"ignored": 0})
    embedder.embed = None
    assert {n.service for n in combined.query(["boat"], 3).found[0]} == {"asked"}
    combined.set_weights({"asked": 0})
    assert combined.is_empty()
    found = combined.query(["boat"], 3)
    assert found.found == ((),)
    assert not found.mask.any()


def test_it_is_empty_when_all_services_are(make):
    first, second = make(), make()
    combined = CombinedRetriever({"first": first, "second": second})
    assert combined.is_empty()
    second.add([{"text": "boat"}])
    assert not combined.is_empty()


def test_weights_that_cannot_be_are_refused_and_change_nothing(make):
    combined = CombinedRetriever({"one": make("a"), "other": make("b")}, {"other": 0.25})
    for weights in ({"one": -1}, {"one": float("nan")}, {"one": 5, "third": 1}):
        with pytest.raises(ValueError, match="weight"):
            combined.set_weights(weights)
    assert combined.weights == {"one": 1.0, "other": 0.25}
    with pytest.raises(ValueError, match="at least one"):
        CombinedRetriever({})
    services = {"one": make("a"), "other": make("b", embedder=WordEmbedder(name="others"))}
    with pytest.raises(ValueError, match=r"words-16'\).*others-16"):
        CombinedRetriever(services)


def test_a_pinned_service_keeps_its_weights_and_documents(make):
    services = {"one": make("the boat", "one boat"), "other": make("a boat", "my boat")}
    combined = CombinedRetriever(services)
    pinned = combined.pinned()
    before = pinned.query(QUERIES, 9)
    combined.set_weights({"one": 0})
    services["other"].reset()
    assert combined.is_empty()
    assert pinned.query(QUERIES, 9).found == before.found


def test_weights_change_together_while_others_ask(make):
    """One service or the other has a weight: with a mixture of settings, both or none would."""
    combined = CombinedRetriever({"one": make("the boat"), "other": make("a boat")})
    settings = [{"one": 1.0, "other": 0.0}, {"other": 1.0, "one": 0.0}]
    combined.set_weights(settings[0])
    stop = threading.Event()

    def change():
        while not stop.is_set():
            for weights in settings:
                combined.set_weights(weights)

    changing = threading.Thread(target=change)
    changing.start()
    answers = {tuple(n.service for n in combined.query(["boat"], 2).found[0]) for _ in range(300)}
    stop.set()
    changing.join()
    assert answers <= {("one",), ("other",)}
