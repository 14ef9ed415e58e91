import pytest
import torch

from model.decoding import Decoder, RetrievalFailedError, TopLogprob
from model.generate_config import GenerateConfig, GenerationError
from tests.model.plain_decoding import ByContent, plain_decode
from tests.model.test_causality import EOD, PAD, VOCABULARY, M, tiny
from tests.model.test_families import FAMILIES

PROMPTS = [[2, 3, 4, 5, 6, 7], [9], list(range(3, 3 + 3 * M)), [5, EOD, 7, 8, 11]]
LENGTH = 40


def config(**changes):
    return GenerateConfig(**({"max_new_tokens": 11, "min_new_tokens": 11} | changes))


def decoder(model, rows=4, **changes):
    return Decoder(model, rows, LENGTH, 3, **changes)


def finish(engine, sequences):
    """Steps until these have ended; the events of each."""
    events = {sequence: [] for sequence in sequences}
    while any(sequence.finish_reason is None for sequence in sequences):
        for event in engine.step():
            events.setdefault(event.sequence, []).append(event)
    return [events[sequence] for sequence in sequences]


def alone(model, prompt, own, retriever=None, **changes):
    engine = decoder(model, 1, **changes)
    return finish(engine, [engine.start(prompt, own, retriever)])[0]


def tokens_of(events):
    return [event.token for event in events]


def close(found, expected):
    """The same tokens, and log-probabilities but for rounding."""
    assert tokens_of(found) == tokens_of(expected)
    pairs = [torch.tensor([e.logprob for e in events]) for events in (found, expected)]
    torch.testing.assert_close(*pairs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_tokens_and_logprobs_are_those_of_full_forward_passes(family, prompt):
    model, own = tiny(**family), config(logprobs=3, neighbors=3)
    expected, logprobs = plain_decode(model, prompt, own, ByContent(2))
    events = alone(model, prompt, own, ByContent(2))
    assert tokens_of(events) == expected
    for event, row in zip(events, logprobs, strict=True):
        best = row.topk(3)
        assert [top.token for top in event.top_logprobs] == best.indices.tolist()
        assert event.logprob == pytest.approx(float(row[event.token]), abs=1e-5)
        found = [top.logprob for top in event.top_logprobs]
        assert found == pytest.approx(best.values.tolist(), abs=1e-5)
    assert isinstance(events[0].top_logprobs[0], TopLogprob)


def test_what_a_sequence_becomes_does_not_depend_on_the_batch():
    model = tiny()
    asked = [
        (PROMPTS[0], config(neighbors=1), ByContent()),
        (PROMPTS[1], config(temperature=1.0, seed=5), ByContent(1)),
        (PROMPTS[2], config(repetition_penalty=1.5), None),
        (PROMPTS[3], config(neighbors=3, retrieval_interval=2, pad_tokens=True), ByContent()),
    ]
    expected = [alone(model, *one, pad_id=PAD) for one in asked]
    engine = decoder(model, pad_id=PAD)
    first = [engine.start(*asked[i]) for i in (2, 0)]
    early = engine.step()
    second = engine.start(*asked[3])
    early += engine.step()
    sequences = [*first, second, engine.start(*asked[1])]
    events = finish(engine, sequences)
    for i, sequence, late in zip((2, 0, 3, 1), sequences, events, strict=True):
        close([e for e in early if e.sequence is sequence] + late, expected[i])


def test_cancelled_and_ended_sequences_leave_nothing_behind():
    model, retriever = tiny(), ByContent()
    expected = [alone(model, prompt, config(), retriever) for prompt in PROMPTS]
    engine = decoder(model, 2)
    gone = engine.start(PROMPTS[2], config(neighbors=3), retriever)
    kept = engine.start(PROMPTS[0], config(), retriever)
    with pytest.raises(GenerationError, match="2 sequences are in progress"):
        engine.start(PROMPTS[1], config(), retriever)
    early = [event for _ in range(3) for event in engine.step() if event.sequence is kept]
    engine.cancel(gone)
    engine.cancel(gone)
    assert (gone.finish_reason, gone.row) == ("cancelled", None)
    assert engine.free == 1
    following = engine.start(PROMPTS[3], config(), retriever)
    late, after = finish(engine, [kept, following])
    close(early + late, expected[0])
    close(after, expected[3])
    unread = engine.start(PROMPTS[1], config(), retriever)
    engine.cancel(unread)
    assert (engine.step(), engine.running, engine.free) == ([], (), 2)
    cache = engine._model.cache
    assert cache.rows == []
    assert not any(tensor.any() for tensor in cache.tensors())


def test_chunks_that_end_in_one_step_are_one_call_of_each_retriever_and_number():
    model, shared, own = tiny(), ByContent(), ByContent()
    engine = decoder(model)
    engine.start(PROMPTS[2], config(), shared)
    engine.start(PROMPTS[0], config(), shared)
    engine.start(PROMPTS[0], config(neighbors=1), shared)
    engine.start(PROMPTS[0], config(), own)
    engine.step()
    whole = [PROMPTS[2][u * M : u * M + M] for u in range(3)]
    assert shared.calls == [([*whole, PROMPTS[0][:M]], 2), ([PROMPTS[0][:M]], 1)]
    assert own.calls == [([PROMPTS[0][:M]], 2)]


@pytest.mark.parametrize("interval", [1, 2])
def test_each_due_chunk_is_retrieved_once_and_told_with_the_token_after_it(interval):
    retriever, prompt = ByContent(), PROMPTS[2][: 2 * M + 1]
    own = config(retrieval_interval=interval)
    events = alone(tiny(), prompt, own, retriever)
    tokens = prompt + tokens_of(events)
    due = range(0, (len(tokens) - 1) // M, interval)
    asked = [chunk for call, _ in retriever.calls for chunk in call]
    assert asked == [tokens[u * M : u * M + M] for u in due]
    for i, event in enumerate(events):
        last = len(prompt) - 1 + i
        known = 0 if i == 0 else last
        expected = [u * M + M - 1 for u in due if known <= u * M + M - 1 <= last]
        assert [r.position for r in event.retrievals] == expected
    shown = ByContent().retrieve(torch.tensor(asked).numpy(), 2).found
    assert [r.neighbors for event in events for r in event.retrievals] == list(shown)
    assert tokens_of(events) == plain_decode(tiny(), prompt, own, ByContent())[0]


def test_padded_prompts_are_retrieved_for_at_once_and_equal_the_padded_full_forward():
    model, own = tiny(), config(pad_tokens=True)
    for prompt in PROMPTS:
        pads = -len(prompt) % M
        retriever = ByContent()
        events = alone(model, prompt, own, retriever, pad_id=PAD)
        padded = [PAD] * pads + prompt
        assert retriever.calls[0][0] == [padded[u : u + M] for u in range(0, len(padded), M)]
        assert events[0].retrievals[0].position == M - 1 - pads
        expected, logprobs = plain_decode(model, prompt, own, ByContent(), pads, PAD)
        assert tokens_of(events) == expected
        for event, row in zip(events, logprobs, strict=True):
            assert event.logprob == pytest.approx(float(row[event.token]), abs=1e-5)
    off = alone(model, PROMPTS[0], own, None, pad_id=PAD)
    close(off, alone(model, PROMPTS[0], config(), None))


def test_no_neighbors_and_an_empty_retriever_are_retrieval_off_exactly():
    model, prompt = tiny(), PROMPTS[0]
    off = alone(model, prompt, config(), None)
    empty, unasked = ByContent(is_full=False), ByContent()
    for events in (
        alone(model, prompt, config(), empty),
        alone(model, prompt, config(neighbors=0), unasked),
        alone(tiny(dec_cross_attention=()), prompt, config(neighbors=0), unasked),
    ):
        assert [(e.token, e.logprob) for e in events] == [(e.token, e.logprob) for e in off]
    assert empty.calls == unasked.calls == []


def test_neighbors_act_from_the_position_on_from_which_they_are_visible():
    """Retrieval is on for both; one finds nothing."""
    prompt, own = [9], config(logprobs=VOCABULARY)
    found, nothing = (alone(tiny(), prompt, own, ByContent(n)) for n in (2, 0))
    first = found[M - 1].retrievals[0].position
    assert first == M - 1
    for i, pair in enumerate(zip(found[:M], nothing[:M], strict=True)):
        a, b = (e.top_logprobs for e in pair)
        assert (a == b) == (i < first), f"prediction after token {i}"


def test_a_sequence_ends_with_its_document_but_not_too_early():
    model = tiny()
    with torch.no_grad():
        model.head.bias[EOD] = 1e6
    events = alone(model, PROMPTS[0], config(min_new_tokens=0))
    assert [(e.token, e.finish_reason) for e in events] == [(EOD, "eod")]
    events = alone(model, PROMPTS[0], config(min_new_tokens=3))
    assert EOD not in tokens_of(events)[:3]
    assert tokens_of(events)[3:] == [EOD]
    events = alone(model, PROMPTS[0], config())
    assert [e.finish_reason for e in events] == [None] * 10 + ["length"]


def test_a_failing_retriever_stops_its_sequences_and_no_others():
    class Failing(ByContent):
        def retrieve(self, chunks, neighbors):
            if len(self.calls) == 1:
                raise OSError("the service is gone")
            return super().retrieve(chunks, neighbors)

    class Short(ByContent):
        def retrieve(self, chunks, neighbors):
            return super().retrieve(chunks, neighbors - 1)

    model = tiny()
    engine = decoder(model, 3)
    kept = engine.start(PROMPTS[0], config(), ByContent())
    broken = engine.start(PROMPTS[0], config(), Failing())
    early = engine.step() + engine.step()
    for _ in range(2):
        with pytest.raises(RetrievalFailedError, match="the service is gone") as raised:
            engine.step()
    assert raised.value.sequences == (broken,)
    engine.cancel(broken)
    [late] = finish(engine, [kept])
    early = [e for e in early if e.sequence is kept]
    close(early + late, alone(model, PROMPTS[0], config(), ByContent()))
    engine.start(PROMPTS[0], config(), Short())
    with pytest.raises(RetrievalFailedError, match=r"expected \[1, 2, 8\]"):
        engine.step()


def test_what_cannot_be_started_is_refused():
    engine, retriever = decoder(tiny()), ByContent()
    refused = {
        "at least one": ([], config()),
        f"0..{VOCABULARY - 1}": ([VOCABULARY], config()),
        f"expected at most {LENGTH}": ([2] * 30, config()),
        "room for at most 3": ([2], config(neighbors=4)),
        "stop strings need": ([2], config(stop=("a",))),
        "pad id": ([2], config(pad_tokens=True)),
        "the vocabulary has 20": ([2], config(logprobs=21)),
    }
    for message, (prompt, own) in refused.items():
        with pytest.raises(GenerationError, match=message):
            engine.start(prompt, own, retriever)
    with pytest.raises(GenerationError, match="plain decoder"):
        decoder(tiny(dec_cross_attention=())).start([2], config(), retriever)
    assert engine.free == 4


def test_a_decoder_without_room_is_refused():
    for room in ((0, 16), (2, 0)):
        with pytest.raises(GenerationError, match="expected at least 1"):
            Decoder(tiny(), *room)
