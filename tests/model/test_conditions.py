import numpy as np
import pytest

from model.conditions import (
    DEFAULT,
    ConditionError,
    names_of,
    open_condition,
    same_as,
    short_rows,
)
from model.samples import SampleReader

K = 2


@pytest.fixture(scope="module")
def every(data):
    return np.arange(data.training.num_chunks)


def opened(data, name, neighbors=K):
    return open_condition(name, data.training, data.map.load(), data.retrieval, neighbors)


def neighbors_of(data, name, samples=(0, 1, 2, 3)):
    batch = SampleReader(data.training, 64, opened(data, name)).read(list(samples))
    return batch.neighbors, batch.neighbors_mask


def test_random_neighbors_are_others_and_as_many(data, every):
    mapped, drawn = (opened(data, name).candidates(every[None]) for name in ("on", "random"))
    assert np.array_equal(mapped < 0, drawn < 0)
    assert np.mean(mapped == drawn) < 0.5
    assert np.array_equal(drawn, opened(data, "random").candidates(every[None]))


def test_shuffled_neighbors_are_the_same_rows_at_other_chunks(data, every):
    mapped, moved = (opened(data, name).candidates(every) for name in ("on", "shuffled"))
    order = lambda rows: rows[np.lexsort(rows.T)]
    assert np.array_equal(order(mapped), order(moved))
    assert (mapped == moved).all(axis=1).mean() < 0.1


def test_shares_of_the_database_are_what_a_search_of_them_would_find(data, every):
    """The rows less the documents that are not in it, in order; smaller shares are parts of larger
    ones."""
    mapped = opened(data, "on").candidates(every)
    before = set()
    for share in (0.2, 0.6, 0.9):
        reader = opened(data, f"database={share}")
        rows = reader.candidates(every)
        held = {int(d) for d in data.retrieval.chunk_to_doc(rows[rows >= 0])}
        for row, whole in zip(rows, mapped, strict=True):
            documents = data.retrieval.chunk_to_doc(np.maximum(whole, 0))
            expected = [i for i, d in zip(whole, documents, strict=True) if i >= 0 and d in held]
            assert [i for i in row if i >= 0] == expected
        assert before <= held
        assert 0.5 * share < len(held) / data.retrieval.num_documents < 1.5 * share
        before = held
    assert np.array_equal(opened(data, "database=1").candidates(every), mapped)


def test_rows_that_run_short_are_counted(data, every):
    assert short_rows(opened(data, "on"), every) == 0
    reader = opened(data, "database=0.2")
    short = [(row >= 0).sum() < K for row in reader.candidates(every)]
    assert 0 < short_rows(reader, every, block=7) == pytest.approx(np.mean(short))


def test_an_empty_database_is_retrieval_off(data):
    assert opened(data, "off") is None
    assert opened(data, "database=0") is None
    assert same_as("database=0", K) == "off"


def test_halves_hide_the_other_half(data):
    tokens, mask = neighbors_of(data, "on")
    m = data.training.chunk_size
    for name, seen, hidden in (
        ("n_only", slice(m), slice(m, None)),
        ("f_only", slice(m, None), slice(m)),
    ):
        found, part = neighbors_of(data, name)
        assert np.array_equal(found, tokens)
        assert np.array_equal(part[..., seen], mask[..., seen])
        assert mask[..., hidden].any()
        assert not part[..., hidden].any()


def test_the_oracle_is_the_chunk_and_its_continuation_inside_the_document(data):
    dataset, m = data.training, data.training.chunk_size
    tokens, mask = neighbors_of(data, "oracle", range(6))
    assert not mask[:, :, 1:].any()
    stream = dataset.get_chunk(np.arange(6 * 4 + 1), continuation=False)
    documents = dataset.chunk_to_doc(np.arange(len(stream)))
    ends = 0
    for sample in range(6):
        for place in range(4):
            chunk = sample * 4 + place
            row, seen = tokens[sample, place, 0], mask[sample, place, 0]
            assert np.array_equal(row[:m], stream[chunk])
            if documents[chunk] == documents[chunk + 1]:
                assert np.array_equal(row[m:], stream[chunk + 1])
            else:
                ends += 1
                assert not seen[m:].any()
    assert ends > 1


def test_numbers_of_neighbors(data):
    for k in (1, 4):
        assert opened(data, f"k={k}").neighbors == k
    assert same_as("k=2", K) == same_as("database=1.0", K) == "on"
    assert same_as("k=4", K) == "k=4"
    measured, impossible = names_of(DEFAULT, data.map.load())
    assert impossible == ["k=8", "k=16"]
    assert [*measured, *impossible] == sorted(DEFAULT, key=[*measured, *impossible].index)
    assert names_of(DEFAULT, None) == (["off"], [])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("onn", "no condition 'onn'; expected one of on, off"),
        ("k=0", "k= and a number from 1 to 4"),
        ("k=5", "from 1 to 4"),
        ("k=two", "from 1 to 4"),
        ("database=1.5", "from 0 to 1"),
    ],
)
def test_conditions_that_do_not_exist_are_refused(data, name, message):
    with pytest.raises(ConditionError, match=message):
        opened(data, name)
