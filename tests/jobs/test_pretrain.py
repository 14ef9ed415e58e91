"""The training job as users start it, under torchrun; what a run does over starts and stops."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace

import fsspec
import psutil
import pytest
import torch

from jobs import mup_shapes
from jobs.mup_shapes import MupShapesConfig
from model.checkpoint import latest_checkpoint, load_model
from model.config import ModelConfig
from model.export import export_model, load_exported
from model.retro import is_retrieval_parameter
from tests.ranks import train
from tests.s3_server import s3_server
from tests.training_job import STEPS, assert_equal_tensors, job, losses, metrics, plain, tensors

pytestmark = [pytest.mark.dist, pytest.mark.slow]


class Torchrun:
    """A started torchrun; what it prints goes to files beside the run's folder."""

    def __init__(self, output, data, ranks, *options, launcher=()):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [*launcher, f"--nproc_per_node={ranks}"]
        command += ["-m", "jobs.pretrain", f"--output_url={output}"]
        command += [f"--data.train_url={data.training.url}", "--data.seq_length=64"]
        command += ["--model.hidden_size=32", "--model.ffn_hidden_size=64"]
        command += ["--model.num_attention_heads=2", "--model.dec_num_layers=3"]
        command += [f"--trainer.max_steps={STEPS}", "--trainer.global_batch_size=4"]
        command += ["--trainer.micro_batch_size=2", "--checkpoint.interval=3"]
        command += ["--metrics.interval=1", "--optim.warmup_steps=2", "--optim.lr=1e-2"]
        self.out, self.err = output.with_suffix(".out"), output.with_suffix(".err")
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen([*command, *options], stdout=out, stderr=err)

    def result(self):
        code = self.process.wait(timeout=300)
        assert code == 0, self.err.read_text()[-3000:]
        return json.loads(self.out.read_text().strip().splitlines()[-1])

    def ranks(self):
        children = psutil.Process(self.process.pid).children()
        living = [p for p in children if p.status() != psutil.STATUS_ZOMBIE]
        return [p for p in living if "jobs.pretrain" in p.cmdline()]


def pretrain(output, data, ranks, *options):
    return Torchrun(output, data, ranks, *options).result()


def validated(data):
    """Retrieval, and the training dataset in place of a validation dataset."""
    return (
        f"--data.retrieval_url={data.retrieval.url}",
        f"--data.train_map_url={data.map.url}",
        "--model.dec_cross_attention=[1]",
        "--model.enc_num_layers=1",
        "--model.enc_cross_attention=[0]",
        f"--data.validation_url={data.training.url}",
        f"--data.validation_map_url={data.map.url}",
        "--trainer.val_samples=2",
    )


def test_a_complete_run_started_again_does_nothing_and_reports_the_same(data, tmp_path):
    run = tmp_path / "run"
    result = pretrain(run, data, 2, *validated(data))
    assert (result["steps"], result["world_size"]) == (STEPS, 2)
    assert result["tokens"] == STEPS * 4 * 64
    assert result["tokens_per_s"] > 0
    assert result["val_loss_on"] != result["val_loss_off"]
    assert losses(run)[STEPS] < losses(run)[1] - 0.3
    written = (run / "metrics.jsonl").read_text()
    assert f'"val_loss_on": {result["val_loss_on"]}' in written
    assert pretrain(run, data, 2, *validated(data)) == result
    assert (run / "metrics.jsonl").read_text() == written


def long_run(output, data, *launcher):
    endless = ["--trainer.max_steps=100000", "--checkpoint.interval=5", "--optim.lr=1e-3"]
    plain = "--model.dec_cross_attention=[]"
    started = Torchrun(output, data, 2, plain, *endless, launcher=launcher)
    wait_for(lambda: saved_step(output) > 0)
    return started


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def saved_step(output):
    record = latest_checkpoint(str(output))
    return record["progress"]["step"] if record else 0


def test_torchrun_restarts_a_killed_rank_and_the_run_continues(data, tmp_path):
    run = tmp_path / "run"
    started = long_run(run, data, "--max_restarts=1")
    before = started.ranks()
    assert len(before) == 2
    before[1].kill()
    wait_for(lambda: not any(p.is_running() for p in before))
    step = saved_step(run)
    wait_for(lambda: saved_step(run) > step + 5)
    for rank in started.ranks():
        rank.send_signal(signal.SIGUSR1)
    result = started.result()
    assert result["stopped"] == "SIGUSR1"
    assert result["steps"] == saved_step(run) == metrics(run)[-1]["step"]
    assert "continuing at step" in started.err.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_torchrun_that_is_told_to_end_leaves_a_checkpoint_of_the_last_step(
    number, data, tmp_path
):
    """Its own exit code is that of a signal."""
    started = long_run(tmp_path / "run", data, "--signals-to-handle=SIGTERM,SIGUSR1")
    started.process.send_signal(number)
    assert started.process.wait(timeout=120) != 0
    last = metrics(tmp_path / "run")[-1]["step"]
    assert saved_step(tmp_path / "run") == last > 5


def test_a_bounded_run_that_lost_its_last_checkpoint_ends_with_one(data, tmp_path):
    """The number of steps is measured over the first 20, wherever a run continues."""
    bounds = {"trainer__max_minutes": 1e-6, "trainer__max_steps": 1000, "checkpoint__interval": 7}
    last = tmp_path / "run" / "checkpoints" / "step-00000020.json"
    for _ in range(2):
        assert train(job(data, tmp_path / "run", **plain(**bounds)), 1, tmp_path)["steps"] == 20
        last.unlink()


def test_fitting_retrieval_leaves_the_decoder_as_it_was(data, tmp_path):
    train(job(data, tmp_path / "plain", **plain()), 1, tmp_path)
    fitted = {"trainable": "retrieval", "init_url": str(tmp_path / "plain")}
    train(job(data, tmp_path / "retro", **fitted), 2, tmp_path)
    assert metrics(tmp_path / "retro")[-1]["tflops_per_device"] is None
    decoder, retro = load_model(str(tmp_path / "plain")), load_model(str(tmp_path / "retro"))
    weights = dict(decoder.named_parameters())
    for name, parameter in retro.named_parameters():
        assert is_retrieval_parameter(name) or torch.equal(parameter, weights[name]), name
    tokens = torch.arange(2, 66)[None]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    assert torch.equal(decoder(tokens, mask), retro(tokens, mask))
    new = dict(retro.named_parameters())["layers.1.feed_forward_half.cross_attention.query.bias"]
    assert new.any()


def test_a_modern_model_under_muP_trains_sharded_resumes_and_is_exported(data, tmp_path):
    shapes = tmp_path / "shapes.bsh"
    modern = {"normalization": "rmsnorm", "activation": "swiglu", "bias": False}
    widths = {"hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 1}
    base = ModelConfig(**modern, **widths, cross_attention_gate=True)
    delta = replace(base, hidden_size=8, ffn_hidden_size=16, kv_channels=8)
    mup_shapes.run(MupShapesConfig(str(shapes), replace(base, kv_channels=16), delta))
    changes = {f"model__{name}": value for name, value in modern.items()}
    changes |= {"model__cross_attention_gate": True, "model__hidden_dropout": 0.1}
    changes |= {"shape_file": str(shapes), "optim__name": "muadamw"}
    config = job(data, tmp_path / "whole", **changes)
    train(config, 2, tmp_path)
    parts = replace(config, output_url=str(tmp_path / "parts"))
    train(replace(parts, trainer=replace(parts.trainer, stop_after_steps=4)), 2, tmp_path)
    train(parts, 2, tmp_path)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert metrics(tmp_path / "whole")[-1]["lr/decay0.1_x0.5"] > 0
    model = load_model(str(tmp_path / "whole"))
    assert model.config.output_width_mult == 2
    gate = dict(model.named_parameters())["layers.1.feed_forward_half.cross_attention.gate"]
    assert gate.abs() > 0
    record = latest_checkpoint(str(tmp_path / "whole"))
    assert record["width_scales"]["word_embeddings.weight"] == [1, 2.0]
    export_model(str(tmp_path / "whole"), str(tmp_path / "exported"))
    exported = dict(load_exported(str(tmp_path / "exported")).named_parameters())
    assert_equal_tensors(exported, dict(model.named_parameters()))


@pytest.fixture
def bucket(data, monkeypatch):
    with s3_server(monkeypatch):
        filesystem = fsspec.filesystem("s3")
        filesystem.mkdir("retromill-train")
        for name, url in (("train", data.training.url), ("db", data.retrieval.url)):
            filesystem.put(url, f"retromill-train/{name}", recursive=True)
        filesystem.put(data.map.url, "retromill-train/map", recursive=True)
        yield "s3://retromill-train"


def test_a_run_on_object_storage_equals_a_local_one(bucket, data, tmp_path):
    train(job(data, tmp_path / "run"), 2, tmp_path)
    settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    settings["RETROMILL_CACHE"] = str(tmp_path / "cache")
    remote = {
        "data__train_url": f"{bucket}/train",
        "data__train_map_url": f"{bucket}/map",
        "data__retrieval_url": f"{bucket}/db",
        "checkpoint__asynchronous": True,
    }
    config = job(data, f"{bucket}/runs/a", **remote)
    for steps in (3, None):
        short = replace(config.trainer, stop_after_steps=steps)
        result = train(replace(config, trainer=short), 2, tmp_path, environment=settings)
        assert result["steps"] == (steps or STEPS)
    assert_equal_tensors(tensors(config.output_url), tensors(tmp_path / "run"))
    lines = fsspec.filesystem("s3").cat_file(f"{config.output_url}/metrics.jsonl").splitlines()
    found = {line["step"]: line["loss"] for line in map(json.loads, lines)}
    assert found == losses(tmp_path / "run")


def test_a_rank_ends_though_its_launcher_died_while_it_imported(data, tmp_path):
    """The launcher is a shell that starts a rank in a session of its own, as torchrun does."""
    rank = [sys.executable, "-m", "jobs.pretrain", f"--output_url={tmp_path / 'run'}"]
    rank += [f"--data.train_url={data.training.url}", "--model.dec_cross_attention=[]"]
    # The rank would wait for the store of its launcher for many minutes.
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "1", "WORLD_SIZE": "2"}
    subprocess.run(
        ["sh", "-c", f"setsid {shlex.join(rank)} & sleep 2"],
        env=os.environ | store | {"TORCHELASTIC_RUN_ID": "orphaned"},
        capture_output=True,  # ends when the rank closes its end
        timeout=120,
        check=True,
    )
