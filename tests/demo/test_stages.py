from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from demo import chain
from demo.chain import StageError, Stages, _workers


def test_a_finished_stage_is_not_run_again_and_a_failed_one_is(tmp_path):
    stages, calls = Stages(tmp_path / "stages"), []

    def work():
        calls.append(1)
        if len(calls) == 1:
            raise StageError("killed")
        return {"value": len(calls)}

    with pytest.raises(StageError):
        stages.remember("index", work)
    first = stages.remember("index", work)
    assert first["value"] == 2
    assert stages.remember("index", work) == first
    assert len(calls) == 2


def test_a_job_that_refuses_its_input_is_told_apart_from_one_that_fails(tmp_path):
    stages = Stages(tmp_path / "stages")
    with pytest.raises(ValueError, match="refused its input"):
        stages.run("merge", "jobs.merge_data", {"dataset_url": tmp_path, "output_prefix": "x"})
    with pytest.raises(StageError, match="exit code 1"):
        stages.run("merge", "jobs.no_such_job", {})


@pytest.mark.parametrize("is_done", [True, False])
def test_workers_that_end_late_fail_the_run_only_if_work_was_left(monkeypatch, is_done):
    @contextmanager
    def late(_config):
        yield SimpleNamespace(scheduler_info=lambda: {"address": "tcp://scheduler"})
        raise TimeoutError

    monkeypatch.setattr(chain, "dask_client", late)
    if is_done:
        with _workers() as (_, address):
            assert address == "tcp://scheduler"
    else:
        with pytest.raises(TimeoutError), _workers():
            raise TimeoutError
