import pytest

from demo.report import _facts_sentence, _rows, _skipped_sentence, _text_sentence


def report(facts, text, skipped=()):
    """Losses (on, off, random) of facts and (on, off, random, longer) of text."""
    modes = ("on", "off", "random", "longer")
    rows = {
        name: {mode: {"loss": loss} for mode, loss in zip(modes, losses)}
        | {"baseline": {"loss": losses[1]}}
        for name, losses in (("facts", facts), ("text", text))
    }
    rows["facts"]["entropy"] = 3.0
    return {"eval": rows, "corpus": {"skipped": dict(skipped)}}


@pytest.mark.parametrize(
    ("on", "off", "said"),
    [(1.5, 4.0, "come from the neighbors"), (2.9, 4.0, "hardly"), (2.3, 2.4, "hardly")],
)
def test_facts_count_as_used_only_far_below_off_and_a_guess(on, off, said):
    assert said in _facts_sentence(report((on, off, 4.0), (5.0, 5.0, 5.0)))


def test_text_is_said_to_get_better_or_worse_as_it_does():
    better = report((1.0, 4.0, 4.0), (5.0, 5.1, 5.0))
    worse = report((1.0, 4.0, 4.0), (5.1, 5.0, 5.0, 4.8))
    assert "lowers the loss" in _text_sentence(better)
    assert "raises the loss" in _text_sentence(worse)
    assert "same extra time reaches 4.800" in _text_sentence(worse)


def test_the_least_loss_of_a_row_is_marked_wherever_it_is():
    found = dict(_rows(report((1.0, 4.0, 4.0), (5.1, 5.0, 5.2))))
    assert [best for _, best in found["facts (answers)"]] == [True, False, False, False, False]
    assert [best for _, best in found["natural text"]] == [False, True, False, True, False]


def test_skipped_records_are_named_with_their_reasons():
    assert _skipped_sentence(report((1, 2, 3), (1, 2, 3))) == ""
    said = _skipped_sentence(report((1, 2, 3), (1, 2, 3), {"no field 'text'": 2, "not JSON": 1}))
    assert "2 (no field 'text'), 1 (not JSON)" in said
