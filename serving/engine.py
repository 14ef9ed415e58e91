"""The thread that generates: requests wait in a bounded queue, first come, first served, take a
slot of the decoder as soon as one is free, and get their tokens as events.

    asyncio (any loop)  submit -> queue -> thread: start, step, step, ... -> events -> Job.events()

Only this thread touches the decoder. Events of a step reach a loop in one call; each job has a
queue of its own, so no event can reach another client.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias

from model.decoding import ActiveSequence, Decoder, RetrievalFailedError, TokenEvent
from model.generate_config import GenerateConfig
from model.retriever import Retriever
from serving.errors import (
    QueueFullError,
    RequestTimeoutError,
    RetrievalUnavailableError,
    ServingError,
    ShuttingDownError,
    as_serving_error,
)
from serving.limits import Limits
from serving.measures import Measures

log = logging.getLogger(__name__)

_LONGEST_RETRY_S = 60
_PROMPTS_A_STEP = 2
_SMOOTHING = 0.1
_LAST_STEP_S = 5.0

_Item: TypeAlias = tuple[int, TokenEvent] | Exception | None


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue, and how."""

    tokens: Sequence[int]
    config: GenerateConfig
    retriever: Retriever | None


@dataclass(eq=False)
class _Sequence:
    """A prompt of a job, waiting or in progress."""

    job: "Job"
    index: int
    prompt: Prompt
    is_started: bool = False


class Job:
    """The prompts of one client. Use it as an async context manager: leaving it, in whatever way,
    ends what is not finished and frees its slots.

    Attributes:
        prompts: In the order of the indexes of events.
    """

    def __init__(self, engine: "Engine", prompts: Sequence[Prompt]) -> None:
        self.prompts = tuple(prompts)
        self.is_over = False
        self.arrival = time.monotonic()
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[_Item] = asyncio.Queue()
        self._engine = engine
        self._deadline = self.loop.time() + engine.limits.timeout_s

    async def __aenter__(self) -> "Job":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._engine.cancel(self)

    def stop(self) -> None:
        """Ends what is not finished, and `events` after those that have come. Call it in the loop
        of the job."""
        self._engine.cancel(self)
        self.queue.put_nowait(None)

    async def events(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        """(index of the prompt, its next token) until all prompts are finished, or `stop`.

        Raises:
            GenerationError: a prompt cannot be continued as asked.
            ServingError: time-out, failed retrieval, or the server ends; the job is over.
        """
        unfinished = len(self.prompts)
        while unfinished and (item := await self._next()) is not None:
            if isinstance(item, Exception):
                raise item
            unfinished -= item[1].finish_reason is not None
            yield item

    async def _next(self) -> "_Item":
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self.queue.get()
        except TimeoutError:
            self._engine.cancel(self)
            return RequestTimeoutError(
                f"not finished within {self._engine.limits.timeout_s:g} s; ask for fewer tokens, "
                "or later"
            )


class Engine:
    """Owns a decoder.

    Args:
        decoder: With room for limits.max_sequences; used by nobody else from `start` on.
        limits: Sizes of the queue, time-outs.
        measures: Where counts and times go.
    """

    def __init__(self, decoder: Decoder, limits: Limits, measures: Measures) -> None:
        self._decoder, self.limits, self.measures = decoder, limits, measures
        self._changed = threading.Condition()
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[ActiveSequence, _Sequence] = {}
        self._is_refusing = False
        self._ends_at: float | None = None
        self._typical_s = 1.0
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        measures.observe("queue_length", "Sequences that wait", lambda: self.num_waiting)
        measures.observe("running", "Sequences in progress", lambda: self.num_running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def is_serving(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._is_refusing

    def start(self) -> None:
        self._thread.start()

    def submit(self, prompts: Sequence[Prompt]) -> Job:
        """Queues all prompts or none; called with a running event loop, where their events arrive.

        Raises:
            QueueFullError: too many wait; `headers` says when to come again.
            ShuttingDownError: the server is being stopped.
        """
        job = Job(self, prompts)
        with self._changed:
            if not self.is_serving:
                raise _shutting_down()
            if len(self._waiting) + len(prompts) > self.limits.max_queued:
                self.measures.refused.inc(len(prompts))
                raise self._queue_full()
            self._waiting += [_Sequence(job, i, prompt) for i, prompt in enumerate(prompts)]
            self._changed.notify()
        self.measures.prompt_tokens.inc(sum(len(prompt.tokens) for prompt in prompts))
        return job

    def cancel(self, job: Job) -> None:
        """Takes a job out of the queue, and out of the decoder before its next step; nothing
        happens if it is finished."""
        job.is_over = True
        with self._changed:
            if any(sequence.job is job for sequence in self._waiting):
                kept = [sequence for sequence in self._waiting if sequence.job is not job]
                self.measures.cancelled.inc(len(self._waiting) - len(kept))
                self._waiting = deque(kept)

    def refuse(self) -> None:
        """Takes no more requests; those taken have `grace_s` seconds to end. Takes no lock, so that
        a signal handler can call it."""
        if not self._is_refusing:
            self._ends_at = time.monotonic() + self.limits.grace_s
            self._is_refusing = True

    def close(self) -> None:
        """Refuses requests and waits until those taken have ended, or their time is up. Blocks."""
        self.refuse()
        with self._changed:
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(self.limits.grace_s + _LAST_STEP_S)
        if self._thread.is_alive():
            log.error("a step did not end; what was in progress is lost")

    def _queue_full(self) -> QueueFullError:
        rounds = len(self._waiting) / self.limits.max_sequences
        seconds = min(math.ceil(rounds * self._typical_s), _LONGEST_RETRY_S)
        return QueueFullError(
            f"{len(self._waiting)} sequences wait, at most {self.limits.max_queued} may; try again "
            "later",
            headers={"Retry-After": str(max(seconds, 1))},
        )

    def _run(self) -> None:
        error: Exception = _shutting_down()
        try:
            while self._take_in():
                self._step()
        except Exception as fault:
            error = as_serving_error(fault)
        finally:
            with self._changed:
                self._is_refusing = True
                left = [*self._running.values(), *self._waiting]
                self._waiting.clear()
            self._running.clear()
            self._fail(left, error)

    def _take_in(self) -> bool:
        """Takes a few into free slots, once there is something to do; False when it is time to end.

        Prompts are read one after the other: more of them in a step would keep all others waiting
        for their next token, and the first of a burst for the last."""
        with self._changed:
            while not (self._waiting or self._running or self._is_refusing):
                self._changed.wait()
            if self._is_refusing and self._is_time_to_end():
                return False
            self._drop_cancelled()
            free = min(self._decoder.free, len(self._waiting), _PROMPTS_A_STEP)
            fresh = [self._waiting.popleft() for _ in range(free)]
        for sequence in fresh:
            self._start(sequence)
        return True

    def _is_time_to_end(self) -> bool:
        is_idle = not (self._waiting or self._running)
        return is_idle or (self._ends_at is not None and time.monotonic() >= self._ends_at)

    def _drop_cancelled(self) -> None:
        for active, sequence in list(self._running.items()):
            if sequence.job.is_over:
                self._decoder.cancel(active)
                del self._running[active]
                self.measures.cancelled.inc()

    def _start(self, sequence: _Sequence) -> None:
        prompt = sequence.prompt
        if sequence.job.is_over:
            self.measures.cancelled.inc()
            return
        try:
            active = self._decoder.start(prompt.tokens, prompt.config, prompt.retriever)
        except Exception as error:
            self._fail([sequence], error)
        else:
            self._running[active] = sequence

    def _step(self) -> None:
        start = time.perf_counter()
        try:
            events = self._decoder.step()
        except RetrievalFailedError as failure:
            log.error("retrieval failed", exc_info=failure)
            error = RetrievalUnavailableError(
                "a retrieval service failed; try again, or turn retrieval off"
            )
            self._give_up(failure.sequences, error)
            return
        except Exception as fault:
            self._give_up(tuple(self._running), as_serving_error(fault))
            return
        if events:
            self.measures.step_s.observe(time.perf_counter() - start)
            self.measures.generated_tokens.inc(len(events))
            self._deliver(events)

    def _give_up(self, actives: Iterable[Any], error: ServingError) -> None:
        sequences = []
        for active in actives:
            self._decoder.cancel(active)
            sequences.append(self._running.pop(active))
        self._fail(sequences, error)

    def _deliver(self, events: Iterable[TokenEvent]) -> None:
        now, parcels = time.monotonic(), []
        for event in events:
            sequence = self._running[event.sequence]
            job = sequence.job
            if not sequence.is_started:
                sequence.is_started = True
                self.measures.first_token_s.observe(now - job.arrival)
            if event.finish_reason is not None:
                del self._running[event.sequence]
                self.measures.sequence_s.observe(now - job.arrival)
                self._typical_s += _SMOOTHING * (now - job.arrival - self._typical_s)
            parcels.append((job, (sequence.index, event)))
        _send(parcels)

    def _fail(self, sequences: Iterable[_Sequence], error: Exception) -> None:
        """Tells their jobs, which are over then."""
        jobs = list(dict.fromkeys(sequence.job for sequence in sequences))
        for job in jobs:
            job.is_over = True
        _send([(job, error) for job in jobs])


def warm_up(decoder: Decoder, tokens: Sequence[int], retriever: Retriever | None) -> None:
    """Generates a few tokens, so that the first request does not wait for what is done once. Before
    an engine has the decoder."""
    decoder.start(tokens, GenerateConfig(max_new_tokens=4), retriever)
    while decoder.running:
        decoder.step()


def _send(parcels: Iterable[tuple[Job, Any]]) -> None:
    """Into the queues of the jobs, in one call a loop; jobs whose loop has ended are over."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, Any]]] = {}
    for job, item in parcels:
        by_loop.setdefault(job.loop, []).append((job, item))
    for loop, own in by_loop.items():
        try:
            loop.call_soon_threadsafe(_receive, own)
        except RuntimeError:
            for job, _ in own:
                job.is_over = True


def _receive(parcels: list[tuple[Job, Any]]) -> None:
    for job, item in parcels:
        job.queue.put_nowait(item)


def _shutting_down() -> ShuttingDownError:
    return ShuttingDownError("the server is being stopped", headers={"Retry-After": "30"})
