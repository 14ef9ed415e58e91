from dataclasses import astuple

import numpy as np
import pytest

from model.config import RetroConfig
from model.evaluation import LossSums, batches_of, before_first_retrieval, loss_sums
from model.initialization import initialize
from model.retro import Retro
from model.samples import NeighborReader, SampleReader, split_documents


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


def test_sums_do_not_depend_on_batches_or_ranks(model, reader):
    numbers = np.arange(7)
    lengths = np.ones(reader.num_tokens)

    def total(size, ranks):
        parts = [
            loss_sums(
                model, reader, batches_of(numbers, size, rank, ranks), True, "cpu", None, lengths
            )
            for rank in range(ranks)
        ]
        return sum(parts[1:], parts[0])

    whole = total(7, 1)
    assert whole.tokens == whole.bytes == reader.read(numbers).loss_mask.sum()
    for size, ranks in ((1, 1), (2, 1), (3, 2), (4, 3)):
        assert astuple(total(size, ranks)) == pytest.approx(astuple(whole), rel=1e-5)


def test_parts_of_a_dataset_are_scored_by_their_own_tokens(model, data):
    lengths = np.random.default_rng(0).random(data.training.num_chunks * data.training.chunk_size)

    def total(part):
        reader = SampleReader(data.training, 64, documents=part)
        batches = batches_of(np.arange(reader.num_samples), 4)
        return loss_sums(model, reader, batches, False, byte_counts=lengths)

    whole = total(None)
    parts = [total(part) for part in split_documents("70,20,10", data.training.num_documents)]
    assert all(part.tokens > 0 for part in parts)
    assert sum(part.tokens for part in parts) == whole.tokens
    assert sum(part.bytes for part in parts) == pytest.approx(whole.bytes)


def test_only_scored_labels_count(model, reader):
    scored = np.zeros(reader.num_tokens, bool)
    scored[64:128] = True
    sums = loss_sums(model, reader, [np.arange(3)], False, scored=scored)
    batch = reader.read(np.arange(3))
    assert sums.tokens == batch.loss_mask[0, -1:].sum() + batch.loss_mask[1, :-1].sum()


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
    assert on.loss_before == pytest.approx(off.loss_before, rel=1e-6)
    assert on.loss != pytest.approx(off.loss, rel=1e-6)


def test_summary_gives_means_and_bits_per_byte():
    summary = LossSums(loss=20.0, tokens=10, bytes=40, loss_before=4.0, tokens_before=4).summary()
    assert summary["loss"] == 2.0
    assert summary["ppl"] == pytest.approx(np.exp(2.0))
    assert summary["bpb"] == pytest.approx(20.0 / np.log(2) / 40)
    assert summary["before_first_retrieval"] == {"loss": 1.0, "tokens": 4}
    assert summary["after_first_retrieval"] == {"loss": pytest.approx(16 / 6), "tokens": 6}
    assert LossSums(0, 0, 0, 0, 0).summary()["bpb"] is None


@pytest.mark.parametrize(("count", "size", "ranks"), [(1, 4, 3), (12, 2, 3), (13, 2, 3), (5, 8, 1)])
def test_batches_deal_every_sample_once_in_equal_rounds(count, size, ranks):
    dealt = [batches_of(np.arange(count), size, rank, ranks) for rank in range(ranks)]
    assert len({len(batches) for batches in dealt}) == 1
    assert all(len(batch) == size for batches in dealt for batch in batches)
    numbers = np.concatenate([batch for batches in dealt for batch in batches])
    assert sorted(numbers[numbers >= 0].tolist()) == list(range(count))


def test_random_initial_loss_is_near_uniform(model, reader):
    summary = loss_sums(model, reader, [np.arange(8)], False).summary()
    assert summary["loss"] == pytest.approx(np.log(model.config.vocab_size), rel=0.05)
