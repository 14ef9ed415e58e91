"""Jobs as processes of their own that start at once: they are forked from a launcher that has
imported what takes long, and loaded the tests' embedder, but has computed nothing yet (a fork after
OpenMP was used hangs).

    launcher = Launcher()
    job = launcher.start("build_index", "all", "--output_url=...")
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
"""

import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class Job:
    """A job that was started; a group of processes of its own."""

    launcher: "Launcher"
    pid: int
    output: Path
    code: int | None = None

    def wait(self):
        """The exit code; -9 if it was killed."""
        if self.code is None:
            self.code = self.launcher.ask({"wait": self.pid})
        return self.code

    @property
    def ended(self):
        """Whether it has ended, without waiting for it."""
        if self.code is None:
            self.code = self.launcher.ask({"wait": self.pid, "at_once": True})
        return self.code is not None

    @property
    def stderr(self):
        return (self.output / "stderr").read_text()

    def result(self):
        """The JSON object on the last line, once the job has ended well."""
        assert self.wait() == 0, self.stderr
        return json.loads((self.output / "stdout").read_text().splitlines()[-1])


class Launcher:
    """The process that jobs are forked from; the environment of a job is this process's at its
    start."""

    def __init__(self, embedder):
        self._outputs = tempfile.TemporaryDirectory(prefix="jobs-")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.job_launcher", json.dumps(embedder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment | {"PYTHONPATH": str(ROOT)},
        )

    def ask(self, request):
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def start(self, job, *arguments, file_bytes=None, environment=None):
        """Starts `python -m jobs.JOB ARGUMENTS`; no file that it writes may exceed file_bytes."""
        output = Path(tempfile.mkdtemp(dir=self._outputs.name))
        request = {
            "module": f"jobs.{job}",
            "arguments": [str(argument) for argument in arguments],
            "environment": {**os.environ, **(environment or {})},
            "output": str(output),
            "file_bytes": file_bytes,
        }
        return Job(self, self.ask(request), output)

    def stop(self):
        self._process.stdin.close()
        self._process.wait()
        self._outputs.cleanup()


def _serve(embedder):
    """Answers a start with the process id, a wait with the exit code."""
    from indexing.embedder import EmbedderConfig, load_embedder

    load_embedder(EmbedderConfig(**embedder))
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            options = os.WNOHANG if request.get("at_once") else 0
            pid, status = os.waitpid(request["wait"], options)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _become(request)
        print(json.dumps(answer), flush=True)


def _become(request):
    os.setsid()
    os.environ.update(request["environment"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{request['output']}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], resource.RLIM_INFINITY))
    sys.argv = [request["module"], *request["arguments"]]
    code = 1
    try:
        runpy.run_module(request["module"], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
