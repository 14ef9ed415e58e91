import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from etl.prepare import PrepareConfig
from jobs import build_index, build_knn_map, prepare_data
from jobs.command_line import run_job

ROOT = Path(__file__).parents[2]
KNN_URLS = ("dataset", "index", "retrieval", "output")


@dataclass(frozen=True)
class Inner:
    """What is inside.

    Attributes:
        size: A number.
    """

    size: int = 3

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"size is {self.size}; expected 0 or more")


@dataclass(frozen=True)
class Config:
    """A job.

    Attributes:
        stage: What to do.
        name: A word.
        inner: More of it.
        dry_run: Only look.
    """

    stage: Literal["make", "break", "refuse"]
    name: str
    inner: Inner = field(default_factory=Inner)
    dry_run: bool = False


def job(config):
    print("progress", file=sys.stderr)
    if config.stage == "break":
        raise RuntimeError("broken")
    if config.stage == "refuse":
        raise FileNotFoundError(f"{config.name}: no such file")
    return {"name": config.name, "size": config.inner.size, "dry_run": config.dry_run}


def run(capsys, *args, config_class=Config, function=job):
    with pytest.raises(SystemExit) as ended:
        run_job("A job.", config_class, function, list(args))
    return ended.value.code, *capsys.readouterr()


def test_result_is_one_json_object_and_the_only_line_of_stdout(capsys):
    code, out, err = run(capsys, "make", "--name=a\nb", "--inner.size=4", "--dry_run")
    assert code == 0
    assert out.count("\n") == 1
    assert json.loads(out) == {"name": "a\nb", "size": 4, "dry_run": True}
    assert "progress" in err


def test_later_options_override_the_file(capsys, tmp_path):
    (tmp_path / "job.yaml").write_text("name: from-file\ninner:\n  size: 7\n")
    file = f"--config={tmp_path / 'job.yaml'}"
    assert json.loads(run(capsys, "make", file)[1])["size"] == 7
    code, out, _ = run(capsys, "make", file, "--inner.size=8")
    assert (code, json.loads(out)) == (0, {"name": "from-file", "size": 8, "dry_run": False})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["make"], "name"),
        (["make", "--name=a", "--nme=b"], "nme"),
        (["make", "--name=a", "--inner.sise=4"], "sise"),
        (["make", "--name=a", "--inner.size=four"], "four"),
        (["make", "--name=a", "--inner.size=-1"], "error: size is -1; expected 0 or more"),
        (["made", "--name=a"], "made"),
        (["make", "--config=absent.yaml"], "absent.yaml"),
        (["refuse", "--name=a.jsonl"], "error: a.jsonl: no such file"),
    ],
)
def test_bad_configuration_or_input_is_exit_code_2_with_the_reason(capsys, args, message):
    code, out, err = run(capsys, *args)
    assert code == 2
    assert message in err
    assert out == ""
    assert "Traceback" not in err


def test_unknown_key_in_a_file_is_exit_code_2(capsys, tmp_path):
    (tmp_path / "job.yaml").write_text("name: a\nsize: 7\n")
    code, _, err = run(capsys, "make", f"--config={tmp_path / 'job.yaml'}")
    assert code == 2
    assert "size" in err


def test_any_other_failure_is_no_configuration_error():
    with pytest.raises(RuntimeError, match="broken"):
        run_job("A job.", Config, job, ["break", "--name=a"])


def test_help_and_print_config_show_every_option(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for part in ("A word.", "--inner.size", "A number.", "--dry_run", "check the inputs"):
        assert part in out
    code, out, _ = run(capsys, "make", "--name=a", "--print_config")
    assert code == 0
    assert "size: 3" in out


@pytest.mark.parametrize(
    ("config_class", "function", "args", "message"),
    [
        (
            PrepareConfig,
            prepare_data.run,
            ["--input_urls=absent.jsonl", "--output_url=out", "--tokenizer_url=t"],
            "absent.jsonl: no file",
        ),
        (
            build_index.BuildIndexConfig,
            build_index.run,
            ["all", "--dataset_url=absent", "--output_url=out"],
            "expected the folder of a finished dataset",
        ),
        (
            build_index.BuildIndexConfig,
            build_index.run,
            ["merge", "--dataset_url=absent", "--output_url=out", "--shard_id=1"],
            "shard_id names one shard for stages embed and add",
        ),
        (
            build_knn_map.BuildKNNMapConfig,
            build_knn_map.run,
            [
                "all",
                *(f"--{name}_url=absent" for name in ("dataset", "index", "retrieval", "output")),
            ],
            "expected the folder of a finished dataset",
        ),
    ],
    ids=["prepare", "index", "shard_id", "knn"],
)
def test_jobs_refuse_missing_inputs_before_anything_starts(
    capsys, monkeypatch, tmp_path, config_class, function, args, message
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *args, config_class=config_class, function=function)
    assert (code, out) == (2, "")
    assert message in err
    assert list(tmp_path.iterdir()) == []


def corpus_options(tmp_path, tokenizer_url):
    (tmp_path / "a.jsonl").write_text('{"text": "the harbor light"}\n')
    return [
        f"--input_urls={tmp_path / 'a.jsonl'}",
        f"--output_url={tmp_path / 'out'}",
        f"--tokenizer_url={tokenizer_url}",
    ]


def test_dry_run_of_a_job_as_a_program_prints_the_plan_and_writes_nothing(tmp_path, tokenizer_url):
    options = corpus_options(tmp_path, tokenizer_url)
    ended = subprocess.run(
        [sys.executable, "-m", "jobs.prepare_data", *options, "--dry_run"],
        cwd=ROOT,
        env={**os.environ, "JAVA_HOME": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    plan = json.loads(ended.stdout.splitlines()[-1])
    assert (plan["files"], plan["tasks"], plan["dtype"]) == (1, 1, "uint16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--chunk_sise=64", "--text_key", "--duplicates=maybe"])
def test_a_job_as_a_program_refuses_unknown_options(tmp_path, tokenizer_url, option):
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "jobs.prepare_data",
            *corpus_options(tmp_path, tokenizer_url),
            option,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert option.strip("-").split("=")[0] in ended.stderr
    assert ended.stdout == ""


@pytest.mark.spark
def test_prepare_job_gives_what_the_next_job_reads(
    capsys, monkeypatch, spark, tmp_path, tokenizer_url
):
    monkeypatch.setattr(prepare_data, "spark_session", lambda _: spark)
    options = [*corpus_options(tmp_path, tokenizer_url), "--splits_string=1,0,0"]
    code, out, _ = run(capsys, *options, config_class=PrepareConfig, function=prepare_data.run)
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert result["counts"]["documents"] == 1
    config = build_index.BuildIndexConfig(
        "embed", result["datasets"]["train"]["url"], str(tmp_path / "index")
    )
    with pytest.raises(ValueError, match="only a retrieval dataset is indexed"):
        build_index.run(replace(config, dry_run=True))
