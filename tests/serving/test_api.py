"""The HTTP routes: what they answer, and what they refuse."""

import asyncio
import json
from dataclasses import replace

import httpx
import pytest

from model.generate_config import GenerateConfig
from model.generation import generate
from serving.live_documents import LiveConfig
from serving.measures import MeasuredRetriever
from tests.serving.served import (
    DOCUMENTS,
    LIMITS,
    LONG,
    ask,
    client,
    complete,
    live_services,
    make_generator,
    running,
    server,
    stream_events,
    tiny_model,
    wait_until,
)

COMPLETIONS = "/v1/completions"
STARS = "counting the stars is a work of patience"
FACT = "the lantern of the harbor was painted green by the widow Oduya"


@pytest.fixture(scope="module")
def generator(tokenizer_url):
    with running(make_generator(tokenizer_url)) as made:
        yield made


@pytest.fixture
def fresh(generator):
    """The same, with its first documents and weights only."""
    yield generator
    generator.services.dynamic.reset()
    generator.services.dynamic.add(DOCUMENTS)
    generator.services.combined.set_weights({"dynamic": 1.0})


def refused(generator, method, path, body, status):
    [answer] = ask(generator, (method, path, body))
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def streamed(generator, **body):
    request = {"temperature": 0, "stream": True, **body}
    [answer] = ask(generator, ("POST", COMPLETIONS, request))
    assert answer.headers["content-type"].startswith("text/event-stream")
    return stream_events(answer.text)


def test_a_completion_is_what_the_model_generates(generator):
    answer = complete(generator, prompt=LONG, max_tokens=40, neighbors=2, logprobs=2)
    [choice], [prompt] = answer["choices"], generator.encode([LONG])
    [expected] = generate(
        tiny_model(generator.tokenizer),
        [prompt],
        GenerateConfig(max_new_tokens=40, neighbors=2, logprobs=2),
        MeasuredRetriever(generator.services.combined, generator.measures),
        generator.decode,
    )
    assert choice["text"] == expected.text
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected.logprobs)
    best = [[top.logprob for top in each] for each in expected.top_logprobs]
    found = [list(each.values()) for each in choice["logprobs"]["top_logprobs"]]
    assert [pytest.approx(each) for each in best] == found
    shown = [(r["position"], [n["id"] for n in r["neighbors"]]) for r in choice["retrieved"]]
    assert shown == [(r.position, [n.id for n in r.neighbors]) for r in expected.retrievals]
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": len(expected.logprobs),
        "total_tokens": len(expected.tokens),
    }


def test_neighbors_come_with_text_source_score_service_and_id(generator):
    [choice] = complete(generator, prompt=LONG, max_tokens=1, neighbors=1)["choices"]
    first = choice["retrieved"][0]["neighbors"][0]
    assert first.pop("score") > 0.9
    assert first == {"text": LONG[:60], "source": "harbor", "service": "dynamic", "id": 0}


@pytest.mark.parametrize("options", [{}, {"n": 2, "temperature": 1.0, "seed": 3}, {"echo": True}])
def test_a_stream_says_what_the_whole_answer_says(generator, options):
    body = {"prompt": [LONG, "the north"], "max_tokens": 24, **options}
    if "echo" not in options:
        body["logprobs"] = 1
    whole = complete(generator, **body)
    chunks = streamed(generator, **body, stream_options={"include_usage": True})
    assert chunks.pop()["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [r for part in parts for r in part["retrieved"]] == choice["retrieved"]
        reasons = [part["finish_reason"] for part in parts]
        assert reasons == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        if "echo" not in options:
            told = [x for part in parts for x in part["logprobs"]["tokens"]]
            assert told == choice["logprobs"]["tokens"]


def test_a_chunk_tells_of_a_retrieval_before_the_text_that_used_it(generator):
    body = {"prompt": LONG, "max_tokens": 24, "logprobs": 0}
    prompt = len(generator.encode([LONG])[0])
    chunks = [chunk["choices"][0] for chunk in streamed(generator, **body)]
    assert len(chunks) == 24
    for i, part in enumerate(chunks):
        for retrieval in part["retrieved"]:
            assert i == max(retrieval["position"] + 1 - prompt, 0)
    assert sum(len(part["retrieved"]) for part in chunks) == 3


def test_prompts_may_be_tokens_and_several(generator):
    texts = [LONG, "the stars"]
    tokens = generator.encode(texts)
    alone = [complete(generator, prompt=text)["choices"][0]["text"] for text in texts]
    for prompt in (texts, tokens):
        found = complete(generator, prompt=prompt)["choices"]
        assert [(c["index"], c["text"]) for c in found] == list(enumerate(alone))
    assert complete(generator, prompt=tokens[0])["choices"][0]["text"] == alone[0]
    echoed = complete(generator, prompt=tokens[0], echo=True)["choices"][0]["text"]
    assert echoed == LONG + alone[0]


def test_draws_follow_the_seed_and_differ_between_choices(generator):
    body = {"prompt": "the", "temperature": 1.0, "max_tokens": 12}
    twice = [complete(generator, **body, n=2, seed=7)["choices"] for _ in range(2)]
    assert twice[0] == twice[1]
    first, second = (choice["text"] for choice in twice[0])
    assert first != second
    assert complete(generator, **body, seed=8)["choices"][0]["text"] == second
    assert complete(generator, **body)["choices"] != complete(generator, **body)["choices"]


def test_options_reach_the_model(generator):
    plain = complete(generator, prompt=LONG, max_tokens=20)["choices"][0]
    stop = plain["text"][5:8]
    stopped = complete(generator, prompt=LONG, max_tokens=20, stop=stop)["choices"][0]
    cut = plain["text"][: plain["text"].index(stop)]
    assert (stopped["text"], stopped["finish_reason"]) == (cut, "stop")
    off = complete(generator, prompt=LONG, max_tokens=20, retrieval=False)["choices"][0]
    none = complete(generator, prompt=LONG, max_tokens=20, neighbors=0)["choices"][0]
    assert off == none
    assert off["retrieved"] == []
    assert off["text"] != plain["text"]
    every_third = complete(generator, prompt=LONG, max_tokens=40, retrieval_interval=3)
    assert [r["position"] for r in every_third["choices"][0]["retrieved"]] == [15, 63]
    padded = complete(generator, prompt="the", max_tokens=1, pad_tokens=True)["choices"][0]
    assert [r["position"] for r in padded["retrieved"]] == [0]
    assert complete(generator, prompt=LONG, max_tokens=20, repetition_penalty=5.0) != plain
    assert (
        complete(generator, prompt=LONG, top_k=1, temperature=1.0, max_tokens=20)["choices"][0][
            "text"
        ]
        == (plain["text"])
    )


def test_an_added_fact_is_found_at_once_and_a_reset_restores_every_byte(fresh):
    body = {"prompt": f"{FACT} and", "max_tokens": 30}
    before = complete(fresh, **body)["choices"]
    ids = [n["id"] for n in before[0]["retrieved"][0]["neighbors"]]
    add, reset = ("POST", "/v1/documents", {"documents": [{"text": FACT}]}), "/v1/documents"
    [added] = ask(fresh, add)
    assert (added.json()["ids"], added.json()["num_documents"]) == ([3], 4)
    after = complete(fresh, **body)["choices"]
    first = after[0]["retrieved"][0]["neighbors"][0]
    assert FACT.startswith(first["text"][:40])
    assert after[0]["text"] != before[0]["text"]
    assert first["id"] not in ids
    [gone] = ask(fresh, ("DELETE", reset, None))
    assert gone.json()["num_documents"] == 0
    assert complete(fresh, **body)["choices"][0]["retrieved"] == []
    ask(fresh, ("POST", "/v1/documents", {"documents": DOCUMENTS}))
    assert json.dumps(complete(fresh, **body)["choices"]) == json.dumps(before)


def test_documents_are_listed_by_pages_with_their_other_fields(generator):
    [page] = ask(generator, ("GET", "/v1/documents?start=1&count=5", None))
    found = page.json()
    assert [d["id"] for d in found["documents"]] == [1, 2]
    assert [d["source"] for d in found["documents"]] == ["Stars", "letters"]
    assert found["documents"][1]["metadata"] == {"n": 1}
    assert found["num_documents"] == 3


def test_texts_are_looked_up_and_weights_act(fresh):
    one, two = ask(
        fresh,
        ("POST", "/v1/retrieve", {"text": STARS, "neighbors": 1}),
        ("POST", "/v1/retrieve", {"texts": ["the boat", STARS]}),
    )
    assert [n["source"] for n in one.json()["results"][0]] == ["Stars"]
    assert [len(own) for own in two.json()["results"]] == [2, 2]
    path, weights = "/v1/retrieval/weights", {"weights": {"dynamic": 0.0}}
    put, got = ask(fresh, ("PUT", path, weights), ("GET", path, None))
    assert put.json() == got.json() == weights
    [none] = ask(fresh, ("POST", "/v1/retrieve", {"text": STARS}))
    assert none.json() == {"results": [[]]}


@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        ({}, "prompt", 422),
        ({"prompt": ""}, "prompt", 422),
        ({"prompt": []}, "prompt", 422),
        ({"prompt": [5, "a"]}, "prompt", 422),
        ({"prompt": "a", "max_tokens": 101}, "max_tokens", 422),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens", 422),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", 422),
        ({"prompt": "a", "neighbors": 4}, "neighbors", 422),
        ({"prompt": "a", "stop": list("abcdefghi")}, "stop", 422),
        ({"prompt": "a", "logprobs": 21}, "logprobs", 422),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "logprobs", 422),
        ({"prompt": "a", "n": 9}, "prompt", 422),
        ({"prompt": "a", "n": 10**15}, "prompt", 422),
        ({"prompt": "a" * 1000}, "prompt", 422),
        ({"prompt": [10**9]}, "prompt", 422),
        ({"prompt": "a", "suffix": "b"}, "suffix", 422),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", 422),
        ({"prompt": "a", "frequency_penalty": 1}, "frequency_penalty", 422),
        ({"prompt": "a", "temperature": 1e-300}, "temperature", 422),
        ({"prompt": "a", "repetition_penalty": 1e-300}, "repetition_penalty", 422),
        ({"prompt": "a", "temperature": 0, "top_k": 3}, None, 422),
        ({"prompt": "a", "best_of": 3}, "best_of", 422),
        ({"prompt": "a", "model": "gpt"}, "model", 404),
    ],
)
def test_what_cannot_be_served_is_refused_and_named(generator, body, param, status):
    error = refused(generator, "POST", COMPLETIONS, body, status)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("documents", "status"),
    [
        ([{"title": "no text"}], 422),
        ([{"text": "good"}, {"text": 5}], 422),
        ([{"text": "x", "n": float("nan")}], 422),
        ([{"text": "a" * 6000}], 413),
        ([{"text": f"{i}"} for i in range(51)], 413),
    ],
)
def test_documents_are_added_all_or_none(generator, documents, status):
    async def send():
        content = json.dumps({"documents": documents})
        headers = {"content-type": "application/json"}
        async with client(generator) as to:
            return await to.post("/v1/documents", content=content, headers=headers)

    answer = asyncio.run(send())
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, "documents")
    assert generator.services.dynamic.num_documents == 3


def test_more_documents_than_the_server_holds_are_refused(fresh):
    batch = [{"text": f"document {i}"} for i in range(50)]
    ask(fresh, ("POST", "/v1/documents", {"documents": batch}))
    more = {"documents": [{"text": f"other {i}"} for i in range(50)]}
    error = refused(fresh, "POST", "/v1/documents", more, 413)
    assert error["code"] == "too_many_documents"


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b'{"prompt": ', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 50_000, "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 422),
        (b'{"prompt": "a", "\\ud800": 1}', "application/json", 422),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", 422),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b'{"prompt": "a"}', None, 415),
        (b'{"prompt": "' + b"a" * 100_000 + b'"}', "application/json", 413),
    ],
)
def test_odd_bodies_get_the_status_that_fits(generator, content, kind, status):
    async def send(body):
        headers = {} if kind is None else {"content-type": kind}
        async with client(generator) as to:
            return await to.post(COMPLETIONS, content=body, headers=headers)

    async def pieces():
        for start in range(0, len(content), 1000):
            yield content[start : start + 1000]

    for body in (content, pieces()):
        answer = asyncio.run(send(body))
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


def test_unknown_paths_and_methods_have_their_own_statuses(generator):
    assert refused(generator, "GET", "/nothing", None, 404)["code"] == "not_found"
    [answer] = ask(generator, ("PATCH", "/v1/documents", {}))
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET, POST")


def test_models_health_and_measures(generator):
    complete(generator, prompt=LONG, max_tokens=2)
    paths = ("/v1/models", "/healthz", "/metrics")
    models, health, metrics = ask(generator, *(("GET", path, None) for path in paths))
    assert [model["id"] for model in models.json()["data"]] == ["tiny"]
    assert health.json() == {"status": "ok"}
    values = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if line[0] != "#")
    counted = ["generated_tokens_total", "time_to_first_token_seconds_count"]
    counted += ["retrieval_seconds_count", "live_documents", "step_seconds_sum"]
    assert all(float(values[f"retromill_{name}"]) > 0 for name in counted)
    assert float(values["retromill_queue_length"]) == 0


def test_without_services_retrieval_can_be_left_out_but_not_asked_for(tokenizer_url):
    plain = make_generator(tokenizer_url, services=None, dec_cross_attention=())
    with running(plain):
        assert complete(plain, prompt=LONG, max_tokens=3)["choices"][0]["retrieved"] == []
        for asked in ({"retrieval": True}, {"neighbors": 2}):
            error = refused(plain, "POST", COMPLETIONS, {"prompt": "a", **asked}, 422)
            assert error["code"] == "no_retrieval"
        refused(plain, "POST", "/v1/retrieve", {"text": "a"}, 404)
        refused(plain, "GET", "/v1/documents", None, 404)


def test_a_failing_service_is_503_without_its_reason(generator, monkeypatch):
    def fail(texts):
        raise OSError("/secret/path")

    monkeypatch.setattr(generator.services.embedder, "embed", fail)
    for path, body in ((COMPLETIONS, {"prompt": LONG}), ("/v1/retrieve", {"text": "a"})):
        error = refused(generator, "POST", path, body, 503)
        assert (error["code"], "secret" in error["message"]) == ("retrieval_failed", False)
    error = refused(generator, "POST", COMPLETIONS, {"prompt": LONG, "stream": True}, 503)
    assert error["code"] == "retrieval_failed"
    # The first chunk completes after the stream has begun.
    short = streamed(generator, prompt="the harbor", max_tokens=30, min_tokens=30)
    assert short[-1]["error"]["code"] == "retrieval_failed"
    assert short[0]["choices"]


def test_documents_that_cannot_be_saved_are_503(tokenizer_url, tmp_path):
    services = live_services(
        make_generator(tokenizer_url).tokenizer, LiveConfig(str(tmp_path / "live"))
    )
    with running(make_generator(tokenizer_url, services=services)) as made:
        [good] = ask(made, ("POST", "/v1/documents", {"documents": [{"text": "a"}]}))
        assert good.json()["ids"] == [0]
        (tmp_path / "live").rename(tmp_path / "elsewhere")
        (tmp_path / "live").write_text("a file stands in the way")
        body = {"documents": [{"text": "b"}]}
        error = refused(made, "POST", "/v1/documents", body, 503)
        assert (error["code"], str(tmp_path) in error["message"]) == ("storage_failed", False)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(tokenizer_url, stream):
    limits = replace(LIMITS, max_new_tokens=5000, max_sequences=1)
    generator = make_generator(tokenizer_url, limits)
    body = {"prompt": LONG, "max_tokens": 5000, "min_tokens": 5000, "stream": stream}

    with server(generator) as url:
        if stream:
            with httpx.stream("POST", url + COMPLETIONS, json=body) as answer:
                assert next(answer.iter_lines()).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url + COMPLETIONS, json=body, timeout=0.7)
        assert generator.measures.generated_tokens._value.get() > 0
        wait_until(lambda: generator.engine.num_running + generator.engine.num_waiting == 0, 10)
        assert httpx.post(url + COMPLETIONS, json={"prompt": "a"}).status_code == 200


def test_nemo_generate(generator):
    sentences = [LONG, "the stars"]
    body = {"sentences": sentences, "tokens_to_generate": 20, "greedy": True}
    body |= {"repetition_penalty": 1.0, "end_strings": [], "neighbors": 2, "compute_logprob": True}
    [answer] = ask(generator, ("PUT", "/generate", body))
    found = answer.json()
    same = complete(generator, prompt=sentences, max_tokens=20, logprobs=0)["choices"]
    assert found["sentences"] == [s + c["text"] for s, c in zip(sentences, same)]
    assert found["retrieved"] == [c["retrieved"] for c in same]
    for ids, tokens, offsets, logprob, choice, text in zip(
        *(found[name] for name in ("token_ids", "tokens", "offsets", "logprob")), same, sentences
    ):
        [prompt] = generator.encode([text])
        assert ids[: len(prompt)] == prompt
        assert tokens[len(prompt) :] == choice["logprobs"]["tokens"]
        assert len(ids) == len(tokens) == len(offsets) == len(logprob) + 1
        assert offsets[len(prompt)] == len(text)
        assert logprob[len(prompt) - 1 :] == choice["logprobs"]["token_logprobs"]
    assert len(found["sentences"][0]) > len(LONG)
    for option in ({"all_probs": True}, {"add_BOS": True}, {"task_ids": [1]}, {"max_len": 4}):
        refused(generator, "PUT", "/generate", body | option, 422)


def test_nemo_generate_has_nemos_defaults(generator):
    drawn = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5}
    expected = complete(generator, prompt="the", max_tokens=64, stop="<|endoftext|>", **drawn)
    body = {"sentences": ["the"], "random_seed": 5}
    [answer] = ask(generator, ("PUT", "/generate", body))
    assert answer.json()["sentences"] == ["the" + expected["choices"][0]["text"]]


def test_nemo_knn(fresh):
    put = lambda body: ask(fresh, ("PUT", "/knn", body))[0]
    query = {"sentences": [STARS, FACT], "neighbors": 2}
    tokens = put(query).json()
    assert [[len(row) for row in own] for own in tokens] == [[32, 32], [32, 32]]
    assert fresh.decode(tokens[0][0]) == DOCUMENTS[1]["text"]
    assert put(query | {"sentences": FACT}).json() == tokens[1]
    assert put({"sentences": [FACT], "add_eos": True}).json() == "success"
    assert any(fresh.decode(row) in FACT for row in put(query).json()[1])
    assert put({"update_weight": [0.5]}).json() == "success"
    assert fresh.services.combined.weights == {"dynamic": 0.5}
    assert put({"reset": None}).json() == "success"
    pads = put(query).json()
    assert {token for own in pads for row in own for token in row} == {fresh.tokenizer.pad_id}
    for bad in ({"index_name": "/tmp/x"}, {"update_weight": [1.0, 2.0]}, {"sentences": []}):
        refused(fresh, "PUT", "/knn", bad, 422)
    refused(fresh, "PUT", "/knn", {"sentences": ["a"], "add_eos": False}, 422)
