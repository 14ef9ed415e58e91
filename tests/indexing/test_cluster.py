"""The same tasks in this process, on local workers and on an existing scheduler: equal results,
equal failure rules."""

import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from dask import config as dask_config
from dask.utils import parse_timedelta

from indexing import dask_runner
from indexing.cluster import ClusterConfig, ClusterError, dask_client, open_runner
from tests.dask_processes import dask_processes, self_signed_certificate

pytestmark = pytest.mark.dask


def square(task, i):
    return {"rows": 10, "value": task["factor"] * i * i}


def fail_at_first(task, i):
    """Leaves a file at every attempt and succeeds at the third."""
    folder = Path(task["folder"])
    attempt = len(list(folder.glob(f"{i}-*")))
    (folder / f"{i}-{attempt}").touch()
    if attempt < 2:
        raise OSError(f"attempt {attempt} of task {i}")
    return {"attempts": attempt + 1}


def fail_for_good(task, i):
    (Path(task["folder"]) / f"ran-{time.time_ns()}").touch()
    if i in task["failing"]:
        logging.getLogger("indexing.tests").info("about to fail with %d", i)
        raise task["failing"][i]
    return {"rows": 1}


def kill_worker(task, i):
    """Task 2 ends its worker's process; the others leave a file."""
    if i == 2:
        os._exit(7)
    (Path(task["folder"]) / f"done-{i}").touch()
    return {"value": i}


def once(task, i):
    """A slow stage in small: nothing to do if the file is there, else half a second of work."""
    path = Path(task["folder"]) / f"made-{i}"
    if not path.exists():
        time.sleep(0.5)
        path.write_text(f"{os.getpid()} {time.time()}")
    return {"made": path.read_text()}


def whole_pid(*_):
    return os.getpid()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def on_dask(reports):
    with open_runner(ClusterConfig(num_workers=2), str(reports)) as runner:
        yield runner


@pytest.fixture
def in_process():
    with open_runner(ClusterConfig(kind="none")) as runner:
        yield runner


@pytest.fixture(params=["in_process", "on_dask"])
def runner(request):
    return request.getfixturevalue(request.param)


def events_of(runner, stage):
    logged = [event for _, event in runner.client.get_events(dask_runner.TOPIC)]
    return [event for event in logged if event["stage"] == stage]


def test_results_are_the_same_everywhere_and_in_the_order_of_the_numbers(in_process, on_dask):
    numbers = [5, 3, 40, *range(10, 30)]
    expected = [{"rows": 10, "value": 7 * i * i} for i in numbers]
    for runner in (in_process, on_dask):
        assert runner.run(square, {"factor": 7}, numbers, "square") == expected
    assert (
        dask_runner.DaskRunner(on_dask.client).run(square, {"factor": 7}, numbers, "square")
        == expected
    )
    assert (in_process.num_workers, on_dask.num_workers) == (1, 2)
    assert in_process.call(whole_pid) == os.getpid()
    assert on_dask.call(whole_pid, 1, 2) != os.getpid()


def test_without_a_cluster_dask_is_not_imported():
    code = (
        "import sys; from indexing.cluster import *\n"
        "with open_runner(ClusterConfig(kind='none')) as runner: runner.call(print)\n"
        "assert not {'dask', 'distributed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_exceptions_are_tried_again(runner, tmp_path):
    assert (
        runner.run(fail_at_first, {"folder": str(tmp_path)}, range(2), "retry")
        == [{"attempts": 3}] * 2
    )


def test_input_errors_come_out_as_themselves_at_once_and_after_the_others(runner, tmp_path):
    failing = {1: FileNotFoundError("no such file"), 4: ValueError("a wrong value")}
    with pytest.raises(FileNotFoundError, match="no such file"):
        runner.run(fail_for_good, {"folder": str(tmp_path), "failing": failing}, range(8), "input")
    assert len(list(tmp_path.iterdir())) == 8
    with pytest.raises(FileNotFoundError, match="nowhere"):
        runner.call(open, "/nowhere")


def test_failed_tasks_are_all_named_with_their_causes(runner, tmp_path):
    failing = {1: RuntimeError("the first"), 4: ValueError("the second")}
    task = {"folder": str(tmp_path), "failing": failing}
    with pytest.raises(ClusterError, match=r"mixed: 2 of 6 tasks failed; task 1: .*the first") as e:
        runner.run(fail_for_good, task, range(6), "mixed")
    assert "task 4: ValueError: the second" in str(e.value)
    assert "the same command again does only what is missing" in str(e.value)
    assert len(list(tmp_path.iterdir())) == 8  # task 1 three times


def test_a_failure_brings_the_last_lines_of_its_workers_log(on_dask, tmp_path):
    task = {"folder": str(tmp_path), "failing": {3: RuntimeError("broken")}}
    with pytest.raises(ClusterError, match=r"last lines of worker tcp://[^$]*about to fail with 3"):
        on_dask.run(fail_for_good, task, range(4), "logged")
    lines = str(on_dask.client.get_worker_logs())
    assert "about to fail with 3" in lines
    assert re.search(r"logged [012]: [\d.]+ s, 1 rows, [\d.]+ rows/s", lines)


def test_a_task_that_kills_its_workers_is_named_while_the_others_finish(on_dask, tmp_path):
    with pytest.raises(ClusterError, match=r"1 of 8 tasks failed; task 2: .*that ran it died") as e:
        on_dask.run(kill_worker, {"folder": str(tmp_path)}, range(8), "poison")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"done-{i}" for i in range(8) if i != 2
    ]
    for told in ("smaller tasks", "exited with status 7", "get_worker_logs"):
        assert told in str(e.value)
    assert len(on_dask.run(square, {"factor": 1}, range(4), "afterwards")) == 4


def test_local_workers_that_die_again_and_again_are_not_given_up(on_dask):
    assert on_dask.num_workers == 2
    patience = dask_config.get("distributed.deploy.lost-worker-timeout")
    assert parse_timedelta(patience) > 7 * 24 * 3600  # Dask's own 15 s are over in three deaths


def test_stages_and_tasks_are_events(on_dask):
    on_dask.run(square, {"factor": 1}, range(3), "watched")
    deadline = time.monotonic() + 5
    while len(events := events_of(on_dask, "watched")) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    actions = [event["action"] for event in events]
    assert actions[0] == "watched started"
    assert sorted(actions[1:]) == ["watched ended", *["watched task done"] * 3]
    [ended] = [event for event in events if event["action"] == "watched ended"]
    assert (ended["tasks"], ended["rows"], ended["failed"]) == (3, 30, 0)
    assert ended["rows_per_s"] == pytest.approx(30 / ended["seconds"], rel=0.2)
    done = [event for event in events if event["action"] == "watched task done"]
    assert sorted(event["task"] for event in done) == [0, 1, 2]
    assert all(event["rows"] == 10 and event["rows_per_s"] > 0 for event in done)


def test_every_stage_leaves_a_performance_report(on_dask, reports):
    on_dask.run(square, {"factor": 1}, range(3), "reported")
    [report] = reports.glob("reported-*.html")
    html = report.read_text()
    assert "Task Stream" in html
    assert "reported" in html


def test_a_report_that_cannot_be_stored_fails_nothing(on_dask, tmp_path, caplog):
    (tmp_path / "file").touch()
    runner = dask_runner.DaskRunner(on_dask.client, str(tmp_path / "file"))
    assert len(runner.run(square, {"factor": 1}, range(3), "unreported")) == 3
    assert "no performance report" in caplog.text


def test_few_tasks_are_with_the_scheduler_at_a_time(on_dask):
    client, seen, running = on_dask.client, [], threading.Event()

    def watch():
        while not running.is_set():
            seen.append(client.run_on_scheduler(count_tasks, "bounded"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    dask_runner.DaskRunner(client).run(sleep_a_little, None, range(80), "bounded")
    running.set()
    watcher.join()
    bound = dask_runner.WINDOW_PER_WORKER * on_dask.num_workers
    assert bound // 2 <= max(seen) <= 2 * bound


def sleep_a_little(_, i):
    time.sleep(0.02)
    return {}


def count_tasks(stage, dask_scheduler):
    return sum(str(key).startswith(f"{stage}-") for key in dask_scheduler.tasks)


def test_the_rate_is_shown_while_tasks_run(runner, capfd):
    runner.run(square, {"factor": 1}, range(3), "shown")
    assert re.search(r"shown: 100%.* 3/3 .*rows/s", capfd.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "num_workers is 0, expected at least 1"),
        ({"scheduler_address": "host:8786"}, "expected tcp://HOST:PORT"),
        ({"scheduler_address": "tcp://h:1", "num_workers": 2}, "num_workers .* no effect"),
        ({"scheduler_address": "tcp://h:1", "kind": "cuda"}, "kind cuda has no effect"),
        ({"scheduler_address": "tcp://h:1", "kind": "none"}, "kind none has no effect"),
        ({"scheduler_address": "tcp://h:1", "dashboard_address": ":1"}, "dashboard_address"),
        ({"kind": "none", "num_workers": 2}, "num_workers .* no effect on cluster.kind none"),
        ({"kind": "none", "dashboard_address": ":1"}, "dashboard_address .* no effect"),
        ({"tls_ca_file": "a", "tls_client_cert": "b"}, "tls_ca_file, tls_client_cert: TLS files"),
        ({"scheduler_address": "tcp://h:1", "tls_client_key": "k"}, "expected tls://HOST:PORT"),
        ({"scheduler_address": "tls://h:1", "tls_ca_file": "a"}, "needs tls_client_cert too"),
    ],
)
def test_options_that_cannot_take_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message), open_runner(ClusterConfig(**options)):
        pass


def test_missing_tls_files_are_named():
    tls = ClusterConfig(
        scheduler_address="tls://h:1", tls_ca_file="/nowhere/ca.pem", tls_client_cert="/nowhere"
    )
    with pytest.raises(FileNotFoundError, match=r"tls_ca_file: no file /nowhere/ca.pem"):
        open_runner(tls).__enter__()


def test_cuda_workers_without_dask_cuda_say_what_to_install():
    with pytest.raises(ClusterError, match=r"pip install -e '\.\[index-gpu\]'"):
        open_runner(ClusterConfig(kind="cuda")).__enter__()


def test_an_unreachable_scheduler_is_named():
    with (
        dask_config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(
            ClusterError, match=r"no Dask scheduler answered at tcp://127.0.0.1:9 within"
        ),
        open_runner(ClusterConfig(scheduler_address="tcp://127.0.0.1:9")),
    ):
        pass


def test_a_scheduler_without_workers_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(dask_runner, "NO_WORKERS_S", 0.5)
    with (
        dask_processes(tmp_path) as (address, _),
        open_runner(ClusterConfig(scheduler_address=address)) as runner,
        pytest.raises(ClusterError, match=f"had no worker .* `dask worker {address} --nthreads 1"),
    ):
        runner.run(square, {"factor": 1}, range(2), "idle")


def test_a_scheduler_killed_at_work_ends_the_run_and_nothing_is_lost(tmp_path, in_process):
    task = {"folder": str(tmp_path)}
    killed_at = []

    def kill_when_some_are_done(process):
        while len(list(tmp_path.glob("made-*"))) < 2:
            time.sleep(0.05)
        killed_at.append(time.monotonic())
        process.kill()

    with dask_processes(tmp_path, num_workers=1) as (address, scheduler):
        killer = threading.Thread(target=kill_when_some_are_done, args=(scheduler,))
        killer.start()
        with (
            pytest.raises(ClusterError, match=f"scheduler at {address} went away; what is finish"),
            open_runner(ClusterConfig(scheduler_address=address)) as runner,
        ):
            runner.run(once, task, range(20), "lost")
        killer.join()
        assert time.monotonic() - killed_at[0] < 10
    kept = {path: path.read_text() for path in tmp_path.glob("made-*")}
    assert 2 <= len(kept) < 10
    in_process.run(once, task, range(len(kept) + 1), "again")
    assert {path: path.read_text() for path in kept} == kept


def test_tls_is_spoken_with_the_given_files_and_nothing_else(tmp_path):
    certificate, key = self_signed_certificate(tmp_path)
    tls = ("--tls-ca-file", certificate, "--tls-cert", certificate, "--tls-key", key)
    with dask_processes(tmp_path, num_workers=1, tls=tls) as (address, _):
        assert address.startswith("tls://")
        files = {"tls_ca_file": certificate, "tls_client_cert": certificate, "tls_client_key": key}
        with open_runner(ClusterConfig(scheduler_address=address, **files)) as runner:
            assert runner.run(square, {"factor": 1}, [3], "secret") == [{"rows": 10, "value": 9}]
        for wrong in (address, address.replace("tls", "tcp")):
            with (
                dask_config.set({"distributed.comm.timeouts.connect": "1s"}),
                pytest.raises(ClusterError, match="no Dask scheduler answered"),
                dask_client(ClusterConfig(scheduler_address=wrong)),
            ):
                pass
