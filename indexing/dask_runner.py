"""Running `f(task, i) -> record` on Dask workers, with the failure rules of `indexing/runner.py`.

A bounded window of tasks is submitted at a time, each under a key that names stage and number. The
task object is pickled once and travels inside the submissions: data scattered to workers would be
lost with them. Stages and tasks are events (topic "retromill") and lines on the workers' log pages;
each stage has Dask's performance report.
"""

import logging
import queue
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from etl.storage import join_url, write_atomically
from indexing.runner import (
    INPUT_ERRORS,
    RETRIES,
    ClusterError,
    Tally,
    TaskFunction,
    describe,
    log_retry,
    rows_of,
)

if TYPE_CHECKING:
    from distributed import Client, Future
    from distributed.scheduler import KilledWorker

log = logging.getLogger(__name__)
TOPIC = "retromill"
WINDOW_PER_WORKER = 3
NO_WORKERS_S = 600.0
_TICK_S = 1.0
_COUNT_WORKERS_S = 5.0
_WARN_S = 30.0
_LOG_LINES = 5


class DaskRunner:
    """Tasks on the workers of a Dask client.

    Attributes:
        report_url: Folder (any fsspec URL) for a performance report of each stage, or None.
    """

    def __init__(self, client: "Client", report_url: str | None = None) -> None:
        self.client = client
        self.report_url = report_url

    @property
    def num_workers(self) -> int:
        return max(1, len(cast(Any, self.client.nthreads())))

    def run(
        self, function: TaskFunction, task: Any, numbers: Iterable[int], title: str
    ) -> list[dict[str, Any]]:
        with (
            self._reported(title),
            Tally(title, list(numbers)) as tally,
            self._announced(tally),
        ):
            self._finish_all(function, task, tally)
        return tally.results()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        with Tally(getattr(function, "__name__", "call"), [0], quiet=True) as tally:
            self._finish_all(_call, (function, args), tally)
        return tally.results()[0]["value"]

    def _finish_all(self, function: TaskFunction, task: Any, tally: Tally) -> None:
        """When a worker dies, Dask blames every task that waited on it. Tasks that it gave up are
        run again one by one; what kills a worker then is at fault."""
        from distributed.protocol.pickle import dumps
        from distributed.scheduler import KilledWorker

        stage = _Stage(self.client, dumps((tally.title, function, task)), tally)
        suspects = []
        for i, error in stage.failures(tally.numbers):
            if isinstance(error, KilledWorker):
                suspects.append(i)
            else:
                tally.fail(i, error, _take_note(error))
        for i in suspects:
            log.warning("%s: workers died while they had task %d; it runs alone", tally.title, i)
            for _, error in stage.failures([i]):
                if isinstance(error, KilledWorker):
                    tally.fail(i, _killer(error), self._remedy(error))
                else:
                    tally.fail(i, error, _take_note(error))

    def _remedy(self, error: "KilledWorker") -> str:
        worker = error.last_worker
        return (
            "  Usual causes: out of memory, a crash of native code, kill from outside. Remedy: "
            "smaller tasks (more shards, smaller blocks) or more memory for each worker.\n"
            "  What a dead worker printed stands above (local workers) or in the output of `dask "
            f"worker` on {worker.host}; living workers' logs: client.get_worker_logs() and "
            f"{self.client.dashboard_link}\n"
            + _indent(f"nanny of {worker.address}", self._nanny_log(worker.nanny))
        )

    def _nanny_log(self, nanny: str | None) -> list[str]:
        """The last lines of the nanny that watched a dead worker: how its process ended."""
        if nanny is None:
            return ["it had none; start workers with a nanny, which replaces those that die"]
        try:
            ask = cast(Any, self.client.scheduler).broadcast
            question = {"op": "get_logs", "n": _LOG_LINES}
            answers: Any = self.client.sync(ask, msg=question, workers=[nanny])
        except Exception as error:
            return [f"its log cannot be read: {describe(error)}"]
        return [line for _, line in reversed(answers[nanny])]

    @contextmanager
    def _announced(self, tally: Tally) -> Iterator[None]:
        title, total = tally.title, len(tally.numbers)
        self._log_event(f"{title} started", stage=title, tasks=total)
        yield
        self._log_event(
            f"{title} ended",
            stage=title,
            tasks=total,
            failed=len(tally.failures),
            rows=tally.rows,
            seconds=round(tally.seconds, 3),
            rows_per_s=round(tally.rows_per_s, 1),
        )

    def _log_event(self, action: str, **details: Any) -> None:
        with _warned("event"):
            self.client.log_event([TOPIC, "all"], {"action": action, **details})

    @contextmanager
    def _reported(self, title: str) -> Iterator[None]:
        """Saves Dask's performance report of the body under report_url; never fails the stage."""
        if self.report_url is None:
            yield
            return
        url = join_url(self.report_url, f"{title}-{time.strftime('%Y%m%d-%H%M%S')}.html")
        started, monitored = time.time(), 0
        with _warned("performance report"):
            monitored = self._watch_task_stream()
        yield
        with _warned("performance report"):
            html = self._report(started, monitored, title)
            write_atomically(url, lambda file: file.write(html.encode()))
            log.info("%s: performance report %s", title, url)

    def _watch_task_stream(self) -> int:
        """Starts what the report needs; the scheduler's count of measurements until now."""
        self.client.get_task_stream(start=0, stop=0)
        return cast(int, self.client.run_on_scheduler(_num_measurements))

    def _report(self, started: float, monitored: int, title: str) -> str:
        report = cast(Any, self.client.scheduler).performance_report
        details = {"start": started, "last_count": monitored, "code": title}
        return cast(str, self.client.sync(report, mode="inline", **details))


class _Stage:
    """The submissions of one stage, never more at a time than a few for each worker."""

    def __init__(self, client: "Client", payload: bytes, tally: Tally) -> None:
        self._client, self._payload, self._tally = client, payload, tally
        self._address = cast(Any, client.scheduler).address
        self._run_id = uuid.uuid4().hex
        self._done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._running: dict[str, tuple[int, int]] = {}
        self._num_workers, self._counted = 0, float("-inf")
        self._had_workers = self._warned = time.monotonic()

    def failures(self, numbers: list[int]) -> Iterator[tuple[int, BaseException]]:
        """Runs tasks; enters their records into the tally and yields those that failed for good.

        Raises:
            ClusterError: the scheduler is gone, or had no worker for long.
        """
        waiting = deque(numbers)
        while waiting or self._running:
            while waiting and len(self._running) < self._window():
                self._submit(waiting.popleft(), 0)
            for future in self._next_done():
                i, attempt = self._running.pop(str(future.key))
                error, record = self._outcome(future)
                if error is None:
                    self._tally.succeed(i, record)
                elif attempt < RETRIES and _may_pass(error):
                    log_retry(self._tally.title, i, error, attempt)
                    self._submit(i, attempt + 1)
                else:
                    yield i, error

    def _submit(self, i: int, attempt: int) -> None:
        key = f"{self._tally.title}-{i}-{self._run_id}-{attempt}-{uuid.uuid4().hex[:4]}"
        self._running[key] = i, attempt
        future = self._client.submit(_perform, self._payload, i, key=key, pure=False)
        future.add_done_callback(self._done.put)

    def _next_done(self) -> list["Future"]:
        """The next finished task, or none if none finished for a moment."""
        try:
            return [self._done.get(timeout=_TICK_S)]
        except queue.Empty:
            self._window()
            return []

    def _outcome(self, future: "Future") -> tuple[BaseException | None, Any]:
        from distributed import CancelledError

        try:
            return None, future.result()
        except CancelledError:
            self._check_scheduler()
            raise ClusterError(f"task {future.key} was canceled from outside") from None
        except Exception as error:
            self._check_scheduler()
            return error, None

    def _window(self) -> int:
        """Tasks that may be submitted at the same time; 0 while there is no worker."""
        self._check_scheduler()
        pause = _COUNT_WORKERS_S if self._num_workers else 0.0
        if time.monotonic() > self._counted + pause:
            self._count_workers()
        return WINDOW_PER_WORKER * self._num_workers

    def _count_workers(self) -> None:
        try:
            self._num_workers = len(cast(Any, self._client.nthreads()))
        except OSError:
            raise self._scheduler_lost() from None
        self._counted = now = time.monotonic()
        if self._num_workers:
            self._had_workers = now
            return
        how = f"start some with `dask worker {self._address} --nthreads 1`"
        if now > self._had_workers + NO_WORKERS_S:
            raise ClusterError(
                f"{self._tally.title}: the scheduler at {self._address} had no worker for "
                f"{NO_WORKERS_S:.0f} s; {how}, then the same command again"
            )
        if now > self._warned + _WARN_S:
            self._warned = now
            log.warning("waiting for workers at %s; %s", self._address, how)

    def _check_scheduler(self) -> None:
        if self._client.status != "running":
            raise self._scheduler_lost()

    def _scheduler_lost(self) -> ClusterError:
        return ClusterError(
            f"{self._tally.title}: the Dask scheduler at {self._address} went away; what is "
            "finished is kept, start the same command again when it is back"
        )


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    from distributed.scheduler import KilledWorker

    return not isinstance(error, (*INPUT_ERRORS, KilledWorker))


def _killer(error: "KilledWorker") -> ClusterError:
    return ClusterError(
        f"the workers that ran it died ({error.allowed_failures + 1} times even alone, the last "
        f"one at {error.last_worker.address})"
    )


def _num_measurements(dask_scheduler: Any) -> int:
    return dask_scheduler.monitor.count


def _call(task: tuple[Callable[..., Any], tuple[Any, ...]], _: int) -> dict[str, Any]:
    function, args = task
    return {"value": function(*args)}


@contextmanager
def _warned(what: str) -> Iterator[None]:
    """The body's failure is worth no more than a warning."""
    try:
        yield
    except Exception as error:
        log.warning("no %s: %s", what, describe(error))


def _indent(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"  last lines of {title}:", *(f"    {line}" for line in lines)])


def _take_note(error: BaseException) -> str:
    """What `_perform` noted about the place of a failure, taken off the exception."""
    notes = getattr(error, "__notes__", [])
    return notes.pop() if notes else ""


def _perform(payload: bytes, i: int) -> dict[str, Any]:
    """On a worker: one task, its events, and what is worth knowing if it fails."""
    from distributed import get_worker

    worker, started = get_worker(), time.perf_counter()
    _join_worker_log()
    title, function, task = _unpacked(payload)
    try:
        record = function(task, i)
    except Exception as error:
        lines = [line for _, line in reversed(worker.get_logs(n=_LOG_LINES))]
        error.add_note(_indent(f"worker {worker.address}", lines))
        raise
    seconds, rows = time.perf_counter() - started, rows_of(record)
    rate = None if rows is None else round(rows / max(seconds, 1e-9), 1)
    log.info("%s %d: %.1f s, %s rows, %s rows/s", title, i, seconds, rows, rate)
    details = {"stage": title, "task": i, "seconds": round(seconds, 3), "rows": rows}
    event = {"action": f"{title} task done", **details, "rows_per_s": rate}
    worker.log_event([TOPIC, "all"], event)
    return record


@lru_cache(maxsize=4)
def _unpacked(payload: bytes) -> Any:
    from distributed.protocol.pickle import loads

    return loads(payload)


@lru_cache(maxsize=1)
def _join_worker_log() -> None:
    """Lets the log that Dask shows of a worker hold our packages' lines, not only Dask's own."""
    from distributed.utils import DequeHandler

    logging.basicConfig()
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.WARNING)
    own = logging.getLogger("distributed.worker").handlers
    shown = [handler for handler in own if isinstance(handler, DequeHandler)]
    for package in ("etl", "indexing"):
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        for handler in shown:
            logger.addHandler(handler)
