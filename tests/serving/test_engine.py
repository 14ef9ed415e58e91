"""Continuous batching: queue, slots, cancellation, time-outs, faults and the end."""

import asyncio
import threading
import time
from dataclasses import replace

import pytest

from model.decoding import ActiveSequence
from model.generate_config import GenerateConfig, GenerationError
from model.incremental import IncrementalRetro
from serving.errors import (
    QueueFullError,
    RequestTimeoutError,
    RetrievalUnavailableError,
    ServingError,
    ShuttingDownError,
)
from tests.serving.served import LIMITS, LONG, make_generator, running, wait_until

SMALL = replace(LIMITS, max_sequences=2, max_queued=8)
GREEDY = GenerateConfig(max_new_tokens=30, min_new_tokens=30)


class Stepping:
    """A decoder that steps only when it may, and remembers what was started."""

    def __init__(self, decoder):
        self._decoder = decoder
        self.may_step, self.fails = threading.Event(), False
        self.may_step.set()
        self.started = []

    def start(self, prompt, config, retriever):
        self.started.append(tuple(prompt))
        return self._decoder.start(prompt, config, retriever)

    def step(self):
        assert self.may_step.wait(30)
        if self.fails:
            raise RuntimeError("out of memory")
        return self._decoder.step()

    def __getattr__(self, name):
        return getattr(self._decoder, name)


class Engines:
    """A generator whose decoder is `Stepping`."""

    def __init__(self, tokenizer_url, limits=SMALL):
        self.decoder = None
        self.generator = make_generator(tokenizer_url, limits, decoder=self._keep)
        self.engine = self.generator.engine

    def _keep(self, decoder):
        self.decoder = Stepping(decoder)
        return self.decoder


@pytest.fixture
def small(tokenizer_url):
    made = Engines(tokenizer_url)
    with running(made.generator):
        yield made
        made.decoder.may_step.set()


async def finished(job):
    """The tokens of each prompt of a job."""
    tokens = [[] for _ in job.prompts]
    async with job:
        async for index, event in job.events():
            tokens[index].append(event.token)
    return tokens


def test_prompts_start_in_the_order_in_which_they_came(small):
    async def all_jobs():
        small.decoder.may_step.clear()
        jobs = [await small.generator.open([[i, i]], GREEDY, False) for i in range(2, 9)]
        small.decoder.may_step.set()
        return await asyncio.gather(*map(finished, jobs))

    assert [len(found[0]) for found in asyncio.run(all_jobs())] == [30] * 7
    assert small.decoder.started == [(i, i) for i in range(2, 9)]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(small):
    async def overload():
        small.decoder.may_step.clear()
        jobs = [await small.generator.open([[5]], GREEDY, False) for _ in range(2)]
        await asyncio.to_thread(wait_until, lambda: small.engine.num_running == 2)
        jobs += [await small.generator.open([[5]] * 4, GREEDY, False) for _ in range(2)]
        with pytest.raises(QueueFullError) as refused:
            await small.generator.open([[5]], GREEDY, False)
        small.decoder.may_step.set()
        return refused.value, await asyncio.gather(*map(finished, jobs))

    refused, found = asyncio.run(overload())
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert [len(tokens) for tokens in found] == [1, 1, 4, 4]


def test_what_does_not_fit_the_queue_is_refused_whole(small):
    async def overload():
        small.decoder.may_step.clear()
        jobs = [await small.generator.open([[5]], GREEDY, False) for _ in range(2)]
        await asyncio.to_thread(wait_until, lambda: small.engine.num_running == 2)
        jobs.append(await small.generator.open([[5]] * 6, GREEDY, False))
        with pytest.raises(QueueFullError):
            await small.generator.open([[6]] * 3, GREEDY, False)
        small.decoder.may_step.set()
        await asyncio.gather(*map(finished, jobs))

    asyncio.run(overload())
    assert (6,) not in small.decoder.started


def test_a_job_that_is_stopped_has_what_had_come_and_frees_its_slot(small):
    async def stop():
        async with await small.generator.open([[5]], GREEDY, False) as job:
            events = job.events()
            await anext(events)
            small.decoder.may_step.clear()
            job.stop()
            left = [event async for event in events]
            small.decoder.may_step.set()
            await asyncio.to_thread(wait_until, lambda: small.engine.num_running == 0)
        return left

    assert all(event.finish_reason is None for _, event in asyncio.run(stop()))
    assert small.decoder.free == 2


@pytest.mark.parametrize("is_running", [True, False])
def test_a_job_that_is_left_frees_its_slots_and_its_places(small, is_running):
    async def leave():
        async with await small.generator.open([[5]] * 6, GREEDY, True) as job:
            small.decoder.may_step.set() if is_running else small.decoder.may_step.clear()
            if is_running:
                await anext(job.events())
        assert small.engine.num_waiting == 0
        small.decoder.may_step.set()
        await asyncio.to_thread(wait_until, lambda: small.engine.num_running == 0)
        return await finished(await small.generator.open([[7, 8]] * 2, GREEDY, False))

    assert [len(tokens) for tokens in asyncio.run(leave())] == [30, 30]
    assert small.decoder.free == 2
    assert small.generator.measures.cancelled._value.get() == 6


def test_time_is_up_also_for_who_waits_and_while_a_step_hangs(tokenizer_url):
    hanging = Engines(tokenizer_url, replace(SMALL, timeout_s=0.3))

    async def wait():
        hanging.decoder.may_step.clear()
        jobs = [await hanging.generator.open([[5]], GREEDY, False) for _ in range(4)]
        start = time.monotonic()
        ends = await asyncio.gather(*map(finished, jobs), return_exceptions=True)
        assert time.monotonic() - start < 5
        hanging.decoder.may_step.set()
        hanging.decoder.started.clear()
        await asyncio.to_thread(wait_until, lambda: hanging.engine.num_running == 0)
        return ends, await finished(await hanging.generator.open([[7]], GREEDY, False))

    with running(hanging.generator):
        ends, after = asyncio.run(wait())
    assert [type(end) for end in ends] == [RequestTimeoutError] * 4
    assert len(after[0]) == 30
    assert hanging.decoder.started == [(7,)]


def test_a_failing_retriever_ends_only_who_asked_it(small):
    live = small.generator.services.dynamic

    def fail(texts):
        raise OSError("/secret/index is gone")

    async def mixed():
        long = small.generator.encode([LONG])[0]
        quiet = await small.generator.open([long], GREEDY, False)
        broken = await small.generator.open([long], GREEDY, True)
        return await asyncio.gather(*map(finished, (quiet, broken)), return_exceptions=True)

    working, live.embedder.embed = live.embedder.embed, fail
    quiet, broken = asyncio.run(mixed())
    live.embedder.embed = working
    assert len(quiet[0]) == 30
    assert isinstance(broken, RetrievalUnavailableError)
    assert "secret" not in broken.message
    assert [len(found[0]) for found in asyncio.run(mixed())] == [30, 30]


def test_a_fault_of_the_decoder_ends_who_is_running_and_nothing_else(small):
    async def broken():
        small.decoder.fails = True
        found = await asyncio.gather(
            finished(await small.generator.open([[5]], GREEDY, False)), return_exceptions=True
        )
        small.decoder.fails = False
        return found, await finished(await small.generator.open([[5]], GREEDY, False))

    [fault], after = asyncio.run(broken())
    assert isinstance(fault, ServingError)
    assert (fault.status, "memory" in fault.message) == (500, False)
    assert len(after[0]) == 30


@pytest.mark.parametrize(
    ("owner", "name"), [(IncrementalRetro, "read_prompt"), (ActiveSequence, "add_token")]
)
def test_a_fault_in_the_middle_of_a_step_leaves_nothing_behind(small, monkeypatch, owner, name):
    """The first of two prompts is read, or has its last token, when the second one fails."""
    working, calls = getattr(owner, name), []

    def second_fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return working(*args)

    async def broken():
        job = await small.generator.open([[5], [6]], GenerateConfig(1), False)
        with pytest.raises(ServingError):
            await finished(job)
        return await finished(await small.generator.open([[5]] * 3, GREEDY, False))

    monkeypatch.setattr(owner, name, second_fails)
    assert [len(tokens) for tokens in asyncio.run(broken())] == [30] * 3
    assert small.decoder.free == 2


def test_what_the_decoder_refuses_reaches_its_client_only(small):
    async def both():
        plain = await small.generator.open([[5]], GREEDY, False)
        odd = small.engine.submit([replace(plain.prompts[0], tokens=[10**6])])
        return await asyncio.gather(*map(finished, (plain, odd)), return_exceptions=True)

    good, bad = asyncio.run(both())
    assert len(good[0]) == 30
    assert isinstance(bad, GenerationError)


def test_a_stop_lets_what_was_taken_end_and_takes_no_more(tokenizer_url):
    made = Engines(tokenizer_url)

    async def stop():
        made.decoder.may_step.clear()
        jobs = [await made.generator.open([[5]], GREEDY, False) for _ in range(5)]
        made.engine.refuse()
        with pytest.raises(ShuttingDownError):
            await made.generator.open([[5]], GREEDY, False)
        made.decoder.may_step.set()
        found = await asyncio.gather(*map(finished, jobs))
        await asyncio.to_thread(made.engine.close)
        return found

    with running(made.generator):
        assert [len(tokens[0]) for tokens in asyncio.run(stop())] == [30] * 5
        assert not made.engine.is_serving


def test_after_the_grace_period_everything_ends(tokenizer_url):
    made = Engines(tokenizer_url, replace(SMALL, grace_s=0.0))

    async def stop():
        made.decoder.may_step.clear()
        jobs = [await made.generator.open([[5]], GREEDY, False) for _ in range(5)]
        made.engine.refuse()
        made.decoder.may_step.set()
        return await asyncio.gather(*map(finished, jobs), return_exceptions=True)

    with running(made.generator):
        assert [type(end) for end in asyncio.run(stop())] == [ShuttingDownError] * 5


def test_a_client_whose_loop_is_gone_harms_nobody(small):
    async def abandon():
        small.decoder.may_step.clear()
        await small.generator.open([[5]] * 2, GREEDY, False)

    async def other():
        return await finished(await small.generator.open([[7]], GREEDY, False))

    asyncio.run(abandon())
    small.decoder.may_step.set()
    assert len(asyncio.run(other())[0]) == 30
    wait_until(lambda: small.engine.num_running == 0)
