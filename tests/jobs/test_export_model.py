"""The export job as users start it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import export_model
from jobs.command_line import run_job
from tests.model.test_export import STEP, saved_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_url(data, tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("run"), data)


def test_the_job_exports_a_run_and_its_last_line_says_what(run_url, tmp_path):
    command = [sys.executable, "-m", "jobs.export_model", f"--run_url={run_url}"]
    command += [f"--output_url={tmp_path / 'exported'}", "--dtype=bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() == {"output_url", "parameters", "bytes", "step", "dtype", "seconds"}
    assert (result["step"], result["dtype"]) == (STEP, "bfloat16")
    assert result["bytes"] == (tmp_path / "exported" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run_url={tmp}"], "no checkpoint"),
        (["--run_url={run}", "--dataset_url={tmp}"], "expected the folder of a finished dataset"),
        (["--run_url={run}", "--dtype=int8"], "int8"),
    ],
)
def test_bad_input_ends_with_code_2_and_leaves_nothing(run_url, tmp_path, capsys, options, message):
    args = [option.format(run=run_url, tmp=tmp_path) for option in options]
    args.append(f"--output_url={tmp_path / 'exported'}")
    with pytest.raises(SystemExit) as ended:
        run_job("Export.", export_model.ExportConfig, export_model.run, args)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()
