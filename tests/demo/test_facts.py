import re
from collections import Counter
from math import exp, log

import pytest

from demo.facts import ANSWER_PATTERN, VALUES, guess_entropy, make_facts

TRAIN, VALIDATION, TEST = 300, 20, 30


def is_chunk(text):
    return len(text) >= 300


@pytest.fixture(scope="module", params=["sentences", "pairs"])
def style(request):
    return request.param


@pytest.fixture(scope="module")
def records(style):
    return list(make_facts(TRAIN, VALIDATION, TEST, is_chunk, style=style))


def test_each_place_is_stated_in_retrieval_and_asked_for_in_its_split(records):
    assert Counter(r["split"] for r in records) == {
        "retrieval": TRAIN + VALIDATION + TEST,
        "train": TRAIN,
        "validation": VALIDATION,
        "test": TEST,
    }
    by_place = Counter(r["id"].split("/")[0] for r in records)
    assert set(by_place.values()) == {2}


def test_held_out_places_occur_in_no_training_document(records):
    held_out = {r["id"].split("/")[0] for r in records if r["split"] in ("validation", "test")}
    words = set(re.findall(r"\w+", " ".join(r["text"] for r in records if r["split"] == "train")))
    assert not held_out & words


def test_questions_have_one_answer_an_attribute_and_the_statement_holds_it(records):
    statements = {r["id"].split("/")[0]: r["text"] for r in records if r["split"] == "retrieval"}
    for record in (r for r in records if r["split"] != "retrieval"):
        found = dict(re.findall(r"\n([a-z]+) ([^\n]+)", record["text"]))
        assert found.keys() == VALUES.keys()
        assert re.findall(ANSWER_PATTERN, record["text"]) == list(found.values())
        introduction = record["text"].split("\n")[0]
        for attribute, value in found.items():
            assert value in VALUES[attribute]
            assert value in statements[record["id"].split("/")[0]]
            assert not re.search(rf"\b{value}\b", introduction)


def test_a_guess_costs_what_uniform_values_cost(records):
    """The empirical entropy of the drawn values is close to the uniform one."""
    texts = [r["text"] for r in records if r["split"] != "retrieval"]
    places, total = len(texts), 0.0
    for attribute in VALUES:
        values = Counter(re.findall(rf"\n{attribute} ([^\n]+)", text)[0] for text in texts)
        total -= sum(n / places * log(n / places) for n in values.values())
    assert total == pytest.approx(guess_entropy(), rel=0.05)
    assert exp(guess_entropy()) == pytest.approx(40 * 20 * 20 * 30 * 20 * 12)


def test_facts_depend_on_seed_and_style_alone(records, style):
    assert list(make_facts(TRAIN, VALIDATION, TEST, is_chunk, style=style)) == records
    assert list(make_facts(TRAIN, VALIDATION, TEST, is_chunk, seed=1, style=style)) != records


def test_in_pairs_the_first_chunk_is_that_of_both_documents_of_a_place_and_no_other():
    records = list(make_facts(TRAIN, VALIDATION, TEST, is_chunk, style="pairs"))
    firsts = {r["id"]: r["text"].split("\n")[0] for r in records if r["split"] != "retrieval"}
    assert len(set(firsts.values())) == len(firsts)
    for record in (r for r in records if r["split"] == "retrieval"):
        first = firsts[record["id"].replace("statement", "questions")]
        assert is_chunk(first)
        assert record["text"].startswith(first + " ")


def test_more_places_than_names_are_refused():
    with pytest.raises(ValueError, match="there are names for 50000 at most"):
        next(make_facts(40_000, 10_000, 1, is_chunk))
