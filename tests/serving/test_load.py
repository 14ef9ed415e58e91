"""Many clients at once, and many one after the other."""

import asyncio
import os
import random
import time
from dataclasses import replace

import httpx
import pytest

from tests.serving.served import (
    LIMITS,
    LONG,
    ask,
    client,
    make_generator,
    running,
    server,
    stream_events,
)

CLIENTS, LEAVING = 1000, 50
MANY = replace(LIMITS, max_sequences=16, max_queued=400)
WORDS = LONG.split()


def requests():
    """Kinds of requests, each with an answer of its own."""
    generator = random.Random(3)
    made = []
    for i in range(24):
        prompt = " ".join(generator.choices(WORDS, k=generator.choice([2, 9, 20])))
        options = {"max_tokens": generator.randrange(2, 10), "temperature": 0, "logprobs": 1}
        options |= {"neighbors": generator.choice([0, 1, 2]), "stream": i % 2 == 0}
        made.append(("POST", "/v1/completions", {"prompt": prompt, **options}))
    for i in range(4):
        sentences = [f"{i} {LONG}", f"the {i} stars"]
        body = {"sentences": sentences, "tokens_to_generate": 4, "random_seed": i}
        made.append(("PUT", "/generate", body))
    made += [("POST", "/v1/retrieve", {"text": f"{word} boat"}) for word in WORDS[:4]]
    return made


def content(answer):
    """What does not change from one time to the next."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        return [event["choices"] for event in stream_events(answer.text)]
    found = answer.json()
    return found.get("choices", found)


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_clients_get_their_own_answers(tokenizer_url):
    generator, kinds = make_generator(tokenizer_url, MANY), requests()

    async def one(to, i):
        method, path, body = kinds[i % len(kinds)]
        if i < LEAVING:
            long = {"prompt": f"{i} {LONG}", "max_tokens": 100, "min_tokens": 100}
            with pytest.raises(httpx.TimeoutException):
                await to.post("/v1/completions", json=long, timeout=0.001)
            return None
        return await to.request(method, path, json=body)

    async def all_clients(url):
        most = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=most) as to:
            return await asyncio.gather(*(one(to, i) for i in range(CLIENTS)))

    with server(generator) as url:
        alone = [content(answer) for answer in ask(generator, *kinds)]
        start = time.monotonic()
        answers = asyncio.run(all_clients(url))
        assert time.monotonic() - start < 120
    served = 0
    for i, answer in list(enumerate(answers))[LEAVING:]:
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) >= 1
        else:
            assert answer.status_code == 200, answer.text
            assert content(answer) == alone[i % len(kinds)]
            served += 1
    assert served > MANY.max_queued
    assert generator.engine.num_running == generator.engine.num_waiting == 0


def test_memory_stays_flat_over_thousands_of_requests(tokenizer_url):
    count = int(os.environ.get("RETROMILL_MEMORY_REQUESTS", "2000"))
    body = {"prompt": " ".join(WORDS[:9]), "max_tokens": 2, "pad_tokens": True}
    added = {"documents": [{"text": LONG}]}

    async def send(to, first, last):
        for i in range(first, last, 8):
            own = {**body, "stream": i % 16 == 0}
            batch = [to.post("/v1/completions", json=own) for _ in range(7)]
            answers = await asyncio.gather(*batch, to.post("/v1/documents", json=added))
            assert {answer.status_code for answer in answers} == {200}
            if i % 80 == 0:
                await to.delete("/v1/documents")

    async def measured():
        async with client(generator) as to:
            await send(to, 0, count // 4)
            before = resident_bytes()
            await send(to, count // 4, count)
            return resident_bytes() - before

    generator = make_generator(tokenizer_url)
    with running(generator):
        growth = asyncio.run(measured())
    print(f"{count} requests: {growth / 1e6:.1f} MB more resident memory")
    assert growth < 12e6
