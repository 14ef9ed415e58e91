"""Ranks of a training job as processes of their own, as torchrun starts them, but forked from a
server that has done the imports: they start in a fraction of a second."""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["jobs.pretrain"])


class Ranks:
    """A started job.

    Args:
        config: Of the job: a PretrainConfig, or what `module` takes.
        world_size: Number of ranks.
        logs: Folder for what the ranks print, and the result of rank 0.
        prepare: A function of a module that each rank calls first.
        environment: Variables of the ranks.
        module: The job.
    """

    def __init__(
        self, config, world_size, logs, prepare=None, environment=None, module="jobs.pretrain"
    ):
        self.logs = Path(logs)
        self.logs.mkdir(parents=True, exist_ok=True)
        (self.logs / "result.json").unlink(missing_ok=True)
        port = _free_port() if world_size > 1 else 0
        self.processes = [
            _SERVER.Process(
                target=_run,
                args=(config, rank, world_size, port, logs, prepare, environment or {}, module),
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def kill(self, ranks):
        for rank in ranks:
            self._signal(rank, signal.SIGKILL)

    def stop(self, number, ranks):
        for rank in ranks:
            self._signal(rank, number)

    def _signal(self, rank, number):
        if self.processes[rank].is_alive():
            os.kill(self.processes[rank].pid, number)

    def wait(self, timeout=240):
        """Exit codes. When a rank fails the others are killed, as torchrun does."""
        deadline = time.monotonic() + timeout
        while any(p.is_alive() for p in self.processes):
            failed = any(p.exitcode not in (None, 0) for p in self.processes)
            if failed or time.monotonic() > deadline:
                time.sleep(0.2)
                self.kill(range(len(self.processes)))
            time.sleep(0.02)
        return [p.exitcode for p in self.processes]

    def result(self):
        """Of rank 0, when all ranks ended well."""
        codes = self.wait()
        assert codes == [0] * len(codes), self.printed()
        return json.loads((self.logs / "result.json").read_text())

    def printed(self):
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.logs.glob("rank-*")))


def train(config, world_size, logs, prepare=None, environment=None):
    """The result of a training job that runs to its end."""
    return Ranks(config, world_size, logs, prepare, environment).result()


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(config, rank, world_size, port, logs, prepare, environment, module):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **environment,
    )
    with open(Path(logs) / f"rank-{rank}.log", "a", buffering=1) as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
        import torch

        job = importlib.import_module(module)
        torch.set_num_threads(1)  # as torchrun has it
        try:
            if prepare is not None:
                prepare()
            result = job.run(config)
        except Exception:
            traceback.print_exc()
            os._exit(2)
        if result is not None:
            (Path(logs) / "result.json").write_text(json.dumps(result))
        os._exit(0)
