from dataclasses import replace

import pytest
import torch

from model.generation import GenerateConfig, GenerationError, generate, stream
from tests.model.plain_decoding import ByContent, plain_decode, plain_logits
from tests.model.test_causality import EOD, PAD, tiny

PROMPTS = [[2, 3, 4, 5, 6, 7], [9], [8, 4, 13, 2, 5, 6, 7, 10, 11]]
DRAWN = GenerateConfig(max_new_tokens=10, min_new_tokens=10, temperature=1.2, top_p=0.9, seed=3)


def letters(token_ids):
    return "".join(chr(ord("a") + i) for i in token_ids)


@pytest.mark.parametrize("max_sequences", [1, 2, 5])
def test_more_prompts_than_fit_are_continued_as_each_alone(max_sequences):
    model = tiny()
    configs = [replace(DRAWN, max_new_tokens=10 + i, temperature=0, top_p=1) for i in range(3)]
    found = generate(model, PROMPTS, configs, ByContent(), letters, max_sequences=max_sequences)
    for result, prompt, own in zip(found, PROMPTS, configs, strict=True):
        new = plain_decode(model, prompt, own, ByContent())[0]
        assert result.tokens == prompt + new
        assert result.prompt_tokens == len(prompt)
        assert result.text == letters(t for t in new if t != EOD)
        assert result.finish_reason == ("eod" if new[-1] == EOD else "length")
        positions = range(3, len(result.tokens) - 1, 4)
        assert [r.position for r in result.retrievals] == list(positions)


def test_events_are_the_results():
    own = replace(DRAWN, logprobs=2)
    [result] = generate(tiny(), PROMPTS[:1], own, ByContent(), letters)
    events = [event for index, event in stream(tiny(), PROMPTS[:1], own, ByContent(), letters)]
    assert [e.token for e in events] == result.tokens[result.prompt_tokens :]
    assert "".join(e.text for e in events) == result.text
    assert [e.logprob for e in events] == result.logprobs
    assert [e.top_logprobs for e in events] == result.top_logprobs
    assert [r for e in events for r in e.retrievals] == result.retrievals


def test_draws_repeat_with_their_seed_whatever_else_is_drawn():
    model = tiny()
    runs = [
        generate(model, [PROMPTS[0]] * 3, [replace(DRAWN, seed=s) for s in seeds], None)
        for seeds in ([1, 2, 3], [3, 1, 4])
    ]
    first, second = ([result.tokens for result in run] for run in runs)
    assert (first[0], first[2]) == (second[1], second[0])
    assert len({tuple(tokens) for tokens in first}) == 3


def test_logprobs_are_the_models_own_whatever_acts_on_the_draws():
    model, own = tiny(), replace(DRAWN, top_k=4, repetition_penalty=1.3, logprobs=1)
    [found] = generate(model, PROMPTS[:1], own, ByContent())
    logits = plain_logits(model, found.tokens, own, ByContent())[found.prompt_tokens - 1 : -1]
    new = torch.tensor(found.tokens[found.prompt_tokens :])
    expected = logits.log_softmax(-1).gather(1, new[:, None])[:, 0]
    assert found.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    best = [top[0].token for top in found.top_logprobs]
    assert best == logits.argmax(-1).tolist() != new.tolist()


def test_the_end_of_document_is_a_token_but_no_text():
    model = tiny()
    with torch.no_grad():
        model.head.bias[EOD] = 1e6
    own = GenerateConfig(min_new_tokens=2)
    [found] = generate(model, PROMPTS[:1], own, None, letters)
    assert found.tokens[-1] == EOD
    assert found.text == letters(found.tokens[found.prompt_tokens : -1])
    assert (len(found.text), found.finish_reason) == (2, "eod")


def test_a_stop_string_that_spans_tokens_ends_the_text_before_it():
    model, own = tiny(), replace(DRAWN, temperature=0, top_p=1)
    [free] = generate(model, PROMPTS[:1], own, None, letters)
    stop = free.text[3:6]
    place = free.text.index(stop)
    [found] = generate(model, PROMPTS[:1], replace(own, stop=("no", stop)), None, letters)
    assert found.text == free.text[:place]
    assert found.tokens == free.tokens[: len(PROMPTS[0]) + place + 3]
    assert found.finish_reason == "stop"


def test_repetition_penalty_acts_on_the_prompt_and_the_text():
    model, own = tiny(), replace(DRAWN, temperature=0, top_p=1, repetition_penalty=1.8)
    [found] = generate(model, PROMPTS[:1], own, None)
    plain = replace(own, repetition_penalty=1.0)
    assert generate(model, PROMPTS[:1], plain, None)[0].tokens != found.tokens
    for end in range(found.prompt_tokens, len(found.tokens)):
        logits = plain_logits(model, found.tokens[:end], own, None)[-1]
        for token in set(found.tokens[:end]):
            logits[token] = logits[token] * (1.8 if logits[token] < 0 else 1 / 1.8)
        logits[EOD] = -torch.inf
        assert found.tokens[end] == int(logits.argmax())


def test_padding_needs_room_only_where_it_happens():
    own = replace(DRAWN, pad_tokens=True)
    results = generate(tiny(), PROMPTS, own, ByContent(), pad_id=PAD)
    assert [len(result.tokens) for result in results] == [len(p) + 10 for p in PROMPTS]
    assert all(result.retrievals[0].position < len(PROMPTS[0]) for result in results)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_k": 3, "temperature": 0.0}, "top_k has no effect"),
        ({"top_p": 0.5, "temperature": 0.0}, "top_p has no effect"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens 4 is above"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"stop": ("a", "")}, "stop string is empty"),
        ({"seed": 1 << 63}, "seed is"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"neighbors": -1}, "neighbors is -1"),
        ({"retrieval_interval": 0}, "retrieval_interval is 0"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(GenerationError, match=message):
        GenerateConfig(**({"temperature": 1.0} | wrong))


def test_as_many_configurations_as_prompts_are_needed():
    with pytest.raises(GenerationError, match="2 configurations for 3 prompts"):
        generate(tiny(), PROMPTS, [DRAWN] * 2, None)
