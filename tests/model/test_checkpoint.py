"""What is not a whole checkpoint of the right model does not open."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from etl.storage import StorageError
from model.checkpoint import (
    check_tokenizer,
    latest_checkpoint,
    load_model,
    load_tensors,
    require_checkpoint,
)
from tests.ranks import Ranks, train
from tests.training_job import job, plain

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    train(job(data, folder / "run", **plain()), 2, folder)
    return folder / "run"


@pytest.fixture
def run(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


def folder_of(run):
    return Path(latest_checkpoint(str(run))["folder"].removeprefix("file://"))


def test_a_record_says_what_the_run_was(run, data):
    record = latest_checkpoint(str(run))
    assert record["progress"]["step"] == 6
    assert record["progress"]["samples"] == 48
    assert record["run"]["data"]["train_url"] == data.training.url
    assert record["run"]["optim"]["lr"] == 3e-3
    assert record["fingerprints"]["train"] == [data.training.manifest.fingerprint]
    assert record["width_scales"] is None
    assert require_checkpoint(str(run), 4)["progress"]["step"] == 4
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5"):
        require_checkpoint(str(run), 5)


def test_weights_and_moments_are_there_and_nothing_else(run):
    found = load_tensors(latest_checkpoint(str(run)))
    model = load_model(str(run))
    names = {name for name, _ in model.named_parameters()}
    kinds = ("step", "exp_avg", "exp_avg_sq")
    expected = {f"model.{name}" for name in names}
    expected |= {f"optimizer.{name}.{kind}" for name in names for kind in kinds}
    assert found.keys() == expected
    assert all(torch.equal(p, found[f"model.{name}"]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp"])
def test_cut_and_missing_files_are_named(name, run, data, tmp_path):
    path = folder_of(run) / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match=f"'{name}'.*delete .*step-00000006.json"):
        load_model(str(run))
    path.unlink()
    with pytest.raises(StorageError, match=f"'{name}': \\(None, "):
        load_model(str(run))
    again = Ranks(job(data, run, **plain(trainer__max_steps=6)), 1, tmp_path / "logs")
    assert again.wait() == [2]
    assert "the checkpoint is damaged" in again.printed()
    run.joinpath("checkpoints", "step-00000006.json").unlink()
    assert latest_checkpoint(str(run))["progress"]["step"] == 4
    load_model(str(run))


class Forged:
    def __reduce__(self):
        return print, ("this must not run",)


# Through a module that the list of tensors does name things of, which itself imports os.
BY_DOTS = b"""\x80\x04\x8c%torch.distributed.checkpoint.metadata\x8c\x09os.getpid\x93)R."""


@pytest.mark.parametrize(
    ("forged", "named"),
    [(pickle.dumps(Forged()), "builtins.print"), (BY_DOTS, "checkpoint.metadata.os.getpid")],
)
def test_a_list_of_tensors_that_would_run_something_is_refused(forged, named, run, capsys):
    path = folder_of(run) / ".metadata"
    path.write_bytes(forged)
    record_path = run / "checkpoints" / "step-00000006.json"
    record = json.loads(record_path.read_text())
    record["files"][".metadata"] = path.stat().st_size
    record_path.write_text(json.dumps(record))
    with pytest.raises(StorageError, match=f"{named} has no place in a list of tensors"):
        load_model(str(run))
    assert "must not run" not in capsys.readouterr().out


def test_the_forged_list_would_run_elsewhere():
    assert pickle.loads(BY_DOTS) == os.getpid()


def test_text_of_another_tokenizer_is_refused(run, data):
    record = latest_checkpoint(str(run))
    check_tokenizer(record, data.training.manifest)
    other = replace(data.training.manifest, tokenizer_fingerprint="feed")
    with pytest.raises(StorageError, match="made with feed"):
        check_tokenizer(record, other)


def test_another_configuration_does_not_continue_a_run(run, data, tmp_path):
    other = Ranks(job(data, run, **plain(optim__lr=1.0)), 1, tmp_path / "logs")
    assert other.wait() == [2]
    assert "holds a run of another configuration" in other.printed()
