"""Dask: local worker processes or an existing scheduler, and a bounded way to run `f(task, i) ->
record` on them.

Dask only schedules: the functions are plain, idempotent and run without it just as well. dask is
imported when used.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from tqdm import tqdm

if TYPE_CHECKING:
    from distributed import Client, Future

log = logging.getLogger(__name__)
_WINDOW_PER_WORKER = 3
_RETRIES = 2
_LOCAL_SETTINGS = {
    # Fork after OpenMP was used hangs.
    "distributed.worker.multiprocessing-method": "spawn",
    # Memory limits would count memory-mapped pages, and memory of torch that Dask cannot spill.
    "distributed.worker.memory.spill": False,
    # Dask's default gives every freed megabyte back to the kernel; page faults then cost a fifth of
    # embedding.
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 1 << 30,
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 1 << 30,
}


class ClusterError(RuntimeError):
    """Tasks that failed for good; what the others finished is kept."""


@dataclass(frozen=True)
class ClusterConfig:
    """Where the tasks run.

    Attributes:
        scheduler_address: An existing Dask scheduler (tcp://host:8786); by default workers are
            started here.
        num_workers: Local worker processes, each with one thread; by default one a core.
        dashboard_address: Port (":8787") of the local dashboard; ":0" takes a free one.
    """

    scheduler_address: str | None = None
    num_workers: int | None = None
    dashboard_address: str = ":0"


@contextmanager
def dask_client(config: ClusterConfig) -> Iterator["Client"]:
    """A client of the configured cluster; local workers end with it.

    Raises:
        ValueError: num_workers together with scheduler_address, where it could not take effect.
    """
    from dask import config as dask_config

    dask_config.set({"logging.distributed": "warning"})
    from distributed import Client, LocalCluster

    if config.scheduler_address is not None:
        if config.num_workers is not None:
            raise ValueError(
                "num_workers starts local workers; it has no effect on the cluster at "
                "scheduler_address"
            )
        with Client(config.scheduler_address) as client:
            yield client
        return
    with (
        dask_config.set(_LOCAL_SETTINGS),
        LocalCluster(
            n_workers=config.num_workers or os.cpu_count() or 1,
            threads_per_worker=1,
            memory_limit=None,
            host="127.0.0.1",
            dashboard_address=f"127.0.0.1{config.dashboard_address}",
        ) as cluster,
        Client(cluster) as client,
    ):
        log.info("Dask dashboard: %s", client.dashboard_link)
        yield client


def run_tasks(
    client: "Client",
    function: Callable[[Any, int], dict[str, Any]],
    task: Any,
    numbers: Iterable[int],
    title: str,
) -> list[dict[str, Any]]:
    """Runs function(task, i) for every number; returns the records in the order of the numbers.

    A bounded window of tasks is submitted at a time. A task that fails is tried again, then set
    aside while the others finish.

    Raises:
        ClusterError: tasks that failed for good, with the first cause.
    """
    wanted = list(numbers)
    records: dict[int, dict[str, Any]] = {}
    failures: dict[int, BaseException] = {}
    for i, future in _completed(client, function, task, wanted, title):
        error = cast("BaseException | None", future.exception())
        if error is None:
            records[i] = future.result()
        else:
            failures[i] = error
    if failures:
        i, cause = min(failures.items())
        if isinstance(cause, (ValueError, FileNotFoundError)):
            raise cause
        raise ClusterError(
            f"{title}: {len(failures)} of {len(wanted)} tasks failed; task {i}: {cause!r}"
        ) from cause
    return [records[i] for i in wanted]


def _completed(
    client: "Client",
    function: Callable[[Any, int], dict[str, Any]],
    task: Any,
    numbers: list[int],
    title: str,
) -> Iterator[tuple[int, "Future"]]:
    from distributed import as_completed

    [shared] = cast(list[Any], client.scatter([task], broadcast=True, hash=False))
    waiting = iter(numbers)
    number_of: dict[str, int] = {}

    def submit(i: int) -> "Future":
        future = client.submit(function, shared, i, pure=False, retries=_RETRIES)
        number_of[str(future.key)] = i
        return future

    window = _WINDOW_PER_WORKER * max(1, len(client.scheduler_info()["workers"]))
    running = as_completed([submit(i) for i in islice(waiting, window)])
    with tqdm(
        total=len(numbers), desc=title, file=sys.stderr, mininterval=2, dynamic_ncols=True
    ) as bar:
        for future in running:
            yield number_of[str(future.key)], future
            bar.update()
            following = next(waiting, None)
            if following is not None:
                running.add(submit(following))
