"""Where the stages of index and map run: in this process, on local Dask workers, on one worker per
GPU, or on an existing Dask scheduler. The code of the stages is the same.

Dask only schedules: tasks are plain, idempotent functions that run without it just as well. dask is
imported when used.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from indexing.runner import ClusterError, LocalRunner, Runner, describe

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["ClusterConfig", "ClusterError", "Runner", "dask_client", "open_runner"]

log = logging.getLogger(__name__)
_ANY_PORT = ":0"
_CLOSE_S = 10.0
_LOCAL_SETTINGS = {
    # Fork after OpenMP was used hangs.
    "distributed.worker.multiprocessing-method": "spawn",
    # Memory limits would count memory-mapped pages, and memory of torch that Dask cannot spill.
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.target": False,
    # A task beside which a worker died twice is run again alone (see DaskRunner), so little is
    # gained by more attempts here.
    "distributed.scheduler.allowed-failures": 1,
    # Dask gives up a worker that is not there 15 s after its first death, even if it came back and
    # died again; a busy machine would end up without any.
    "distributed.deploy.lost-worker-timeout": "365 days",
    # Dask's default gives every freed megabyte back to the kernel; page faults then cost a fifth of
    # embedding.
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": 1 << 30,
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": 1 << 30,
}


@dataclass(frozen=True)
class ClusterConfig:
    """Where the tasks run.

    Attributes:
        kind: local starts a worker process with one thread per core; cuda one per GPU (dask-cuda);
            none runs everything in this process, without Dask.
        scheduler_address: An existing Dask scheduler (tcp://host:8786 or tls://host:8786) instead.
        tls_ca_file: PEM file with the authority that signed a tls:// scheduler's certificate.
        tls_client_cert: PEM file with our certificate for it.
        tls_client_key: PEM file with our key; by default it is in tls_client_cert.
        num_workers: Worker processes to start; by default one a core or GPU.
        dashboard_address: Port (":8787") of the started workers' dashboard; ":0" takes a free one.
    """

    kind: Literal["local", "cuda", "none"] = "local"
    scheduler_address: str | None = None
    tls_ca_file: str | None = None
    tls_client_cert: str | None = None
    tls_client_key: str | None = None
    num_workers: int | None = None
    dashboard_address: str = _ANY_PORT


@contextmanager
def open_runner(config: ClusterConfig, report_url: str | None = None) -> Iterator[Runner]:
    """The configured place to run tasks; workers that were started for it end with it.

    Args:
        report_url: Folder (any fsspec URL) for Dask's performance report of each stage.

    Raises:
        ValueError: an option that cannot take effect, or a wrong one.
        FileNotFoundError: a TLS file that does not exist.
        ClusterError: the scheduler does not answer, or dask-cuda is not installed.
    """
    if config.kind == "none":
        _check(config)
        yield LocalRunner()
        return
    with dask_client(config) as client:
        from indexing.dask_runner import DaskRunner

        yield DaskRunner(client, report_url)


@contextmanager
def dask_client(config: ClusterConfig) -> Iterator["Client"]:
    """A client of the configured Dask cluster; raises as `open_runner` does."""
    _check(config)
    if config.kind == "none":
        raise ValueError("cluster.kind none has no Dask client; expected local or cuda")
    from dask import config as dask_config

    dask_config.set({"logging.distributed": "warning"})
    with ExitStack() as stack:
        if config.scheduler_address is not None:
            client = _connect(config, config.scheduler_address)
        else:
            from distributed import Client

            stack.enter_context(dask_config.set(_LOCAL_SETTINGS))
            cluster = _start_workers(config)
            stack.callback(_stop_workers, cluster)
            client = Client(cluster)
        stack.callback(_close, client)
        log.info("Dask dashboard: %s", client.dashboard_link)
        yield client


def _close(client: "Client") -> None:
    """Not the client's own exit: towards a lost scheduler that waits a minute, and tells the
    terminal how its attempts to reconnect end."""
    chatter = logging.getLogger("distributed.client")
    level = chatter.level
    if client.status != "running":
        chatter.setLevel(logging.CRITICAL)
    try:
        client.close(timeout=_CLOSE_S)
    finally:
        chatter.setLevel(level)


def _start_workers(config: ClusterConfig) -> Any:
    from distributed import LocalCluster

    nanny_log = logging.getLogger("distributed.nanny")
    nanny_log.setLevel(logging.INFO)
    nanny_log.addFilter(_tells_of_death)
    shared: dict[str, Any] = {
        "threads_per_worker": 1,
        "memory_limit": None,
        "host": "127.0.0.1",
        "dashboard_address": f"127.0.0.1{config.dashboard_address}",
    }
    if config.kind == "cuda":
        return _start_cuda_workers(n_workers=config.num_workers, **shared)
    return LocalCluster(n_workers=config.num_workers or os.cpu_count() or 1, **shared)


def _stop_workers(cluster: Any) -> None:
    """Closes them; for ever would Dask hang in that while a nanny replaces a worker that died."""
    deadline = time.monotonic() + _CLOSE_S
    while time.monotonic() < deadline and not all(
        nanny.status.name == "running" and nanny.is_alive() for nanny in cluster.workers.values()
    ):
        time.sleep(0.1)
    try:
        cluster.close(timeout=2 * _CLOSE_S)
    except TimeoutError:
        log.warning("workers do not end; they will with this process")


def _tells_of_death(record: logging.LogRecord) -> bool:
    """Of the nannies' chatter, only how a worker's process ended."""
    return record.levelno >= logging.WARNING or str(record.msg).startswith("Worker process")


def _start_cuda_workers(**options: Any) -> Any:
    """A worker per GPU, with neither spilling nor an RMM pool: torch and Faiss allocate for
    themselves."""
    try:
        from dask_cuda import LocalCUDACluster  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ClusterError(
            f"cluster.kind cuda needs dask-cuda, which cannot be imported here ({error}); install "
            "it with `pip install -e '.[index-gpu]'`, or choose cluster.kind local"
        ) from None
    try:
        return LocalCUDACluster(device_memory_limit=None, **options)
    except Exception as error:
        raise ClusterError(
            f"dask-cuda started no workers here ({describe(error)}); look at `nvidia-smi`, or "
            "choose cluster.kind local"
        ) from error


def _connect(config: ClusterConfig, address: str) -> "Client":
    from dask import config as dask_config
    from dask.utils import parse_timedelta
    from distributed import Client

    limit_s = parse_timedelta(dask_config.get("distributed.comm.timeouts.connect"))
    try:
        return Client(address, timeout=limit_s, security=_security(config))
    except Exception as error:
        raise ClusterError(
            f"no Dask scheduler answered at {address} within {limit_s:g} s ({error}); start one "
            "with `dask scheduler`, check address, firewall and TLS files, or leave "
            "cluster.scheduler_address out to start workers here"
        ) from error


def _security(config: ClusterConfig) -> Any:
    """The TLS files for the client; None leaves it to Dask's own configuration."""
    if config.tls_ca_file is None:
        return None
    from distributed.security import Security

    return Security(
        tls_ca_file=config.tls_ca_file,
        tls_client_cert=config.tls_client_cert,
        tls_client_key=config.tls_client_key,
        require_encryption=True,
    )


def _check(config: ClusterConfig) -> None:
    """Refuses options that are wrong or cannot take effect."""
    address = config.scheduler_address
    if config.num_workers is not None and config.num_workers < 1:
        raise ValueError(f"cluster.num_workers is {config.num_workers}, expected at least 1")
    if address is not None and not address.startswith(("tcp://", "tls://")):
        raise ValueError(
            f"cluster.scheduler_address is {address!r}, expected tcp://HOST:PORT or "
            "tls://HOST:PORT, as `dask scheduler` prints it"
        )
    if address is not None and config.kind != "local":
        raise ValueError(
            f"cluster.kind {config.kind} has no effect on the cluster at {address}; its workers "
            "are whatever was started there. Leave one of the two out"
        )
    if address is not None or config.kind == "none":
        where = f"the cluster at {address}" if address else "cluster.kind none"
        for name, idle in (("num_workers", None), ("dashboard_address", _ANY_PORT)):
            if getattr(config, name) != idle:
                raise ValueError(
                    f"cluster.{name} is for workers started here; it has no effect on {where}"
                )
    _check_tls(config)


def _check_tls(config: ClusterConfig) -> None:
    given = {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.name.startswith("tls_") and getattr(config, f.name) is not None
    }
    if not given:
        return
    if not (config.scheduler_address or "").startswith("tls://"):
        raise ValueError(
            f"{', '.join(given)}: TLS files have no effect on scheduler_address "
            f"{config.scheduler_address}; expected tls://HOST:PORT"
        )
    missing = {"tls_ca_file", "tls_client_cert"} - given.keys()
    if missing:
        raise ValueError(f"TLS needs {' and '.join(sorted(missing))} too; found only {given}")
    for name, path in given.items():
        if not os.path.isfile(path):
            raise FileNotFoundError(f"cluster.{name}: no file {path}")
