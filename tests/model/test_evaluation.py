import numpy as np
import pytest

from model.config import RetroConfig
from model.evaluation import (
    LossSums,
    batches_of,
    before_first_retrieval,
    chunk_losses,
    loss_sums,
    scored_labels,
)
from model.initialization import initialize
from model.retro import Retro
from model.samples import NeighborReader, SampleError, SampleReader, split_documents


@pytest.fixture(scope="module")
def reader(data):
    return SampleReader(
        data.training, 64, NeighborReader.open(data.training, data.map, data.retrieval, 2)
    )


@pytest.fixture(scope="module")
def model(data):
    manifest = data.training.manifest
    config = RetroConfig(
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=2,
        dec_num_layers=2,
        dec_cross_attention=(1,),
        enc_num_layers=1,
        enc_cross_attention=(0,),
        vocab_size=manifest.vocab_size,
        eod_id=manifest.eod_id,
        chunk_size=manifest.chunk_size,
    )
    model = Retro(config)
    initialize(model, 0)
    return model.eval()


def every(reader):
    """Every label counts, and stands for one byte."""
    tokens = reader.dataset.num_chunks * reader.dataset.chunk_size
    return np.ones(tokens, bool), np.ones(tokens)


def by_chunk(model, reader, retrieval=False, size=4, scored=None):
    batches = [
        np.arange(i, min(i + size, reader.num_samples)) for i in range(0, reader.num_samples, size)
    ]
    labels, lengths = every(reader)
    return chunk_losses(
        model, reader, batches, retrieval, labels if scored is None else scored, lengths
    )


def test_sums_do_not_depend_on_batches_or_ranks(model, reader):
    numbers = np.arange(7)

    def total(size, ranks):
        parts = [
            loss_sums(model, reader, batches_of(numbers, size, rank, ranks), True)
            for rank in range(ranks)
        ]
        return sum(parts[1:], parts[0])

    whole = total(7, 1)
    assert whole[1] == reader.read(numbers).loss_mask.sum()
    for size, ranks in ((1, 1), (2, 1), (3, 2), (4, 3)):
        assert total(size, ranks) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("retrieval", [True, False])
def test_chunks_add_up_to_the_whole(model, reader, retrieval):
    found = by_chunk(model, reader, retrieval)
    whole = loss_sums(model, reader, [np.arange(reader.num_samples)], retrieval)
    assert found[:4].sum(axis=1) == pytest.approx(whole, rel=1e-5)
    assert found[4].sum() == whole[1]


def test_a_label_belongs_to_the_chunk_it_stands_in(model, reader, data):
    """The first token of a sample is the last label of the one before."""
    counts = by_chunk(model, reader)[1]
    tokens = data.training.get_chunk(np.arange(data.training.num_chunks), continuation=False)
    expected = (tokens != data.training.manifest.pad_id).sum(axis=1)
    expected[data.training.document_first_chunk[:-1]] -= 1
    assert np.array_equal(counts, expected)


@pytest.mark.parametrize("stride", [16, 32, 64])
def test_overlapping_samples_score_every_label_once_with_enough_context(data, stride):
    reader = SampleReader(data.training, 64, stride=stride)
    scored, _ = every(reader)
    numbers = np.arange(reader.num_samples)
    mask, positions = scored_labels(reader, numbers, scored)
    assert np.array_equal(np.sort(positions[mask]), np.arange(1, reader.num_tokens))
    context = positions - (numbers[:, None] * stride)
    assert context[1:][mask[1:]].min() == 64 - stride + 1
    batch = reader.read(numbers)
    stream = data.training.get_chunk(np.arange(data.training.num_chunks), False).ravel()
    assert np.array_equal(batch.labels[mask], stream[positions[mask]])


def test_more_context_does_not_change_which_labels_count(model, data):
    plain, overlapping = (
        by_chunk(model, SampleReader(data.training, 64, stride=stride)) for stride in (64, 32)
    )
    assert np.array_equal(plain[1], overlapping[1])
    assert plain[0].sum() != overlapping[0].sum()
    assert (overlapping[3] <= plain[3]).all()
    assert overlapping[3].sum() < plain[3].sum()


@pytest.mark.parametrize("stride", [0, 8, 80])
def test_a_stride_that_does_not_fit_is_refused(data, stride):
    with pytest.raises(SampleError, match=f"stride {stride}; expected multiples of chunk_size 16"):
        SampleReader(data.training, 64, stride=stride)


def test_parts_of_a_dataset_are_scored_by_their_own_tokens(model, data):
    def total(part):
        return by_chunk(model, SampleReader(data.training, 64, documents=part)).sum(axis=1)

    whole = total(None)
    parts = [total(part) for part in split_documents("70,20,10", data.training.num_documents)]
    assert all(part[1] > 0 for part in parts)
    assert sum(part[1] for part in parts) == whole[1]


def test_only_scored_labels_count(model, reader):
    scored = np.zeros(reader.num_tokens, bool)
    scored[64:128] = True
    counts = by_chunk(model, reader, scored=scored)[1]
    batch = reader.read(np.arange(3))
    assert counts.sum() == batch.loss_mask[0, -1:].sum() + batch.loss_mask[1, :-1].sum()
    assert set(np.flatnonzero(counts)) <= set(range(4, 8))


def test_before_first_retrieval_is_where_no_neighbor_can_be_seen(reader, model):
    """None can where the last completed chunk began in another document."""
    m, eod = model.config.chunk_size, model.config.eod_id
    batch = reader.read(np.arange(reader.num_samples))
    found = before_first_retrieval(batch.to("cpu"), eod, m).numpy()
    for b, row in enumerate(batch.tokens):
        document, chunk_document = 0, {}
        for i, token in enumerate(row):
            if i % m == 0:
                chunk_document[i // m] = document
            last = (i + 1) // m - 1
            assert found[b, i] == (last < 0 or chunk_document[last] != document), (b, i)
            document += token == eod


def test_retrieval_changes_nothing_before_the_first_retrieval(model, reader):
    on, off = (loss_sums(model, reader, [np.arange(8)], mode) for mode in (True, False))
    assert on[2] == pytest.approx(off[2], rel=1e-6)
    assert on[0] != pytest.approx(off[0], rel=1e-6)


def test_summary_gives_means_and_bits_per_byte():
    summary = LossSums(loss=20.0, tokens=10, bytes=40, loss_before=4.0, tokens_before=4).summary()
    assert summary["loss"] == 2.0
    assert summary["ppl"] == pytest.approx(np.exp(2.0))
    assert summary["bpb"] == pytest.approx(20.0 / np.log(2) / 40)
    assert summary["before_first_retrieval"] == {"loss": 1.0, "tokens": 4}
    assert summary["after_first_retrieval"] == {"loss": pytest.approx(16 / 6), "tokens": 6}
    assert LossSums(0, 0, 0, 0).summary()["bpb"] is None


@pytest.mark.parametrize(("count", "size", "ranks"), [(1, 4, 3), (12, 2, 3), (13, 2, 3), (5, 8, 1)])
def test_batches_deal_every_sample_once_in_equal_rounds(count, size, ranks):
    dealt = [batches_of(np.arange(count), size, rank, ranks) for rank in range(ranks)]
    assert len({len(batches) for batches in dealt}) == 1
    assert all(len(batch) == size for batches in dealt for batch in batches)
    numbers = np.concatenate([batch for batches in dealt for batch in batches])
    assert sorted(numbers[numbers >= 0].tolist()) == list(range(count))


def test_random_initial_loss_is_near_uniform(model, reader):
    loss, tokens, *_ = loss_sums(model, reader, [np.arange(8)], False)
    assert loss / tokens == pytest.approx(np.log(model.config.vocab_size), rel=0.05)
