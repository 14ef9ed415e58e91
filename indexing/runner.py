"""Running `f(task, i) -> record` for many i: the interface, its failure rules and the way without a
cluster.

Failure rules, the same everywhere: a task that fails is set aside while the others finish. Input
errors (ValueError, FileNotFoundError) are not tried again and come out as themselves; any other
exception is tried again, then reported in one ClusterError that names every failed task.

Must not import Dask.
"""

import errno
import logging
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from tqdm import tqdm

log = logging.getLogger(__name__)

RETRIES = 2
INPUT_ERRORS = (ValueError, FileNotFoundError)
_NAMED = 10
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
TaskFunction = Callable[[Any, int], dict[str, Any]]


class ClusterError(RuntimeError):
    """Tasks that failed for good, or a cluster that cannot be used; what is finished is kept."""


class Runner(Protocol):
    """Where tasks run."""

    @property
    def num_workers(self) -> int:
        """Worker processes at this moment, at least 1."""
        ...

    def run(
        self, function: TaskFunction, task: Any, numbers: Iterable[int], title: str
    ) -> list[dict[str, Any]]:
        """function(task, i) for every number; the records in the order of the numbers.

        A record's "rows", if it has them, give the rate that is shown.

        Raises:
            ValueError, FileNotFoundError: what a task raised, after the others finished.
            ClusterError: tasks that failed otherwise, each with its cause.
        """
        ...

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), computed on a worker; fails as `run` does."""
        ...


@dataclass
class Tally:
    """What became of a stage's tasks, shown as a progress bar on stderr while they run.

    Attributes:
        notes: By number, what else is known about a failure: where it ran, what was logged there.
    """

    title: str
    numbers: list[int]
    quiet: bool = False
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    failures: dict[int, BaseException] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    rows: int = 0

    def __enter__(self) -> "Tally":
        self._started = time.monotonic()
        self._bar = tqdm(
            total=len(self.numbers),
            desc=self.title,
            unit="task",
            file=sys.stderr,
            mininterval=2,
            dynamic_ncols=True,
            disable=self.quiet,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def succeed(self, i: int, record: dict[str, Any]) -> None:
        self.records[i] = record
        self.rows += rows_of(record) or 0
        if self.rows:
            self._bar.set_postfix_str(f"{self.rows_per_s:,.0f} rows/s", refresh=False)
        self._bar.update()

    def fail(self, i: int, error: BaseException, note: str = "") -> None:
        log.error("%s: task %d failed: %s", self.title, i, describe(error))
        self.failures[i], self.notes[i] = error, note
        self._bar.update()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def rows_per_s(self) -> float:
        return self.rows / max(self.seconds, 1e-9)

    def results(self) -> list[dict[str, Any]]:
        """All records in the order of the numbers, or the error the failures amount to."""
        if not self.failures:
            return [self.records[i] for i in self.numbers]
        first = self.failures[min(self.failures)]
        if all(isinstance(error, INPUT_ERRORS) for error in self.failures.values()):
            raise first
        raise ClusterError(self._report()) from first

    def _report(self) -> str:
        failed = sorted(self.failures)
        named = "\n".join(map(self._describe, failed[:_NAMED]))
        others = ", ".join(map(str, failed[_NAMED:]))
        return (
            f"{self.title}: {len(failed)} of {len(self.numbers)} tasks failed; {named}\n"
            f"{others and f'and tasks {others}{chr(10)}'}"
            "What the other tasks made is kept; the same command again does only what is missing."
        )

    def _describe(self, i: int) -> str:
        return "\n".join(filter(None, [f"task {i}: {describe(self.failures[i])}", self.notes[i]]))


def describe(error: BaseException) -> str:
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno in _FULL:
        said += "; make room where outputs and temporary files are written"
    return said


def rows_of(record: Any) -> int | None:
    """The rows that a record counts, None when it counts none."""
    rows = record.get("rows") if isinstance(record, dict) else None
    return None if rows is None else int(rows)


class LocalRunner:
    """Tasks one after the other in this process."""

    num_workers = 1

    def run(
        self, function: TaskFunction, task: Any, numbers: Iterable[int], title: str
    ) -> list[dict[str, Any]]:
        with Tally(title, list(numbers)) as tally:
            for i in tally.numbers:
                try:
                    tally.succeed(i, _attempt(function, task, i, title))
                except Exception as error:
                    tally.fail(i, error)
        return tally.results()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def _attempt(function: TaskFunction, task: Any, i: int, title: str) -> dict[str, Any]:
    for attempt in range(RETRIES):
        try:
            return function(task, i)
        except INPUT_ERRORS:
            raise
        except Exception as error:
            log_retry(title, i, error, attempt)
    return function(task, i)


def log_retry(title: str, i: int, error: BaseException, attempt: int) -> None:
    log.warning(
        "%s: task %d failed: %s; trying again (%d of %d)",
        title,
        i,
        describe(error),
        attempt + 1,
        RETRIES,
    )
