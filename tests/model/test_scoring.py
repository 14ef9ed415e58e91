import numpy as np
import pytest

from etl.tokenizer import load_tokenizer
from model.scoring import scored_tokens


@pytest.fixture(scope="module")
def token_bytes(tokenizer_url):
    return load_tokenizer(tokenizer_url).token_bytes


def text_of(dataset, token_bytes, places):
    stream = dataset.get_chunk(np.arange(dataset.num_chunks)).ravel()
    return b"".join(token_bytes[t] for t in stream[places])


def test_everything_is_scored_by_default_and_nothing_of_other_sources(data, token_bytes):
    assert scored_tokens(data.training, token_bytes, None, None).all()
    assert scored_tokens(data.training, token_bytes, "corpus", None).all()
    assert not scored_tokens(data.training, token_bytes, "elsewhere", None).any()


def test_answers_are_the_tokens_that_overlap_the_group(data, token_bytes):
    scored = scored_tokens(data.training, token_bytes, None, "captain (harbor|storm)")
    stream = text_of(data.training, token_bytes, np.ones(len(scored), bool))
    expected = stream.count(b"captain harbor") + stream.count(b"captain storm")
    assert expected > 0
    assert np.count_nonzero(np.diff(np.r_[0, scored]) == 1) == expected
    found = text_of(data.training, token_bytes, scored)
    assert set(found.replace(b"harbor", b".").replace(b"storm", b".")) <= set(b". ")


@pytest.mark.parametrize(("pattern", "message"), [("(", "not a regular"), ("a", "no group")])
def test_bad_patterns_are_explained(data, token_bytes, pattern, message):
    with pytest.raises(ValueError, match=message):
        scored_tokens(data.training, token_bytes, None, pattern)
