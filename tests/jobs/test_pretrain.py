"""The training job as users start it: under torchrun, on one rank and two, stopped and resumed."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs import mup_shapes
from jobs.mup_shapes import MupShapesConfig
from model.checkpoint import load_model
from model.config import ModelConfig
from model.retro import is_retrieval_parameter

pytestmark = [pytest.mark.dist, pytest.mark.slow]
STEPS = 6


def pretrain(output, data, ranks, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", "-m", "jobs.pretrain", f"--output_url={output}"]
    command += [f"--data.train_url={data.training.url}", "--data.seq_length=64"]
    command += ["--model.hidden_size=32", "--model.ffn_hidden_size=64"]
    command += ["--model.num_attention_heads=2", "--model.dec_num_layers=3"]
    command += [f"--trainer.max_steps={STEPS}", "--trainer.global_batch_size=4"]
    command += ["--trainer.micro_batch_size=2", "--trainer.save_interval=3"]
    command += ["--trainer.log_interval=1", "--optim.warmup_steps=2", "--optim.lr=1e-2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def retrieval_options(data, *more):
    return (
        f"--data.retrieval_url={data.retrieval.url}",
        f"--data.train_map_url={data.map.url}",
        "--model.dec_cross_attention=[1]",
        "--model.enc_num_layers=1",
        "--model.enc_cross_attention=[0]",
        *more,
    )


def losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def validated(data):
    """The training dataset stands in for a validation dataset."""
    validation = (f"--data.validation_url={data.training.url}", "--trainer.val_samples=2")
    return retrieval_options(data, f"--data.validation_map_url={data.map.url}", *validation)


@pytest.fixture(scope="module")
def result(data, tmp_path_factory):
    return pretrain(tmp_path_factory.mktemp("single"), data, 1, *validated(data))


@pytest.fixture(scope="module")
def single(result):
    return Path(result["run_url"])


def test_a_complete_run_started_again_does_nothing_and_reports_the_same(single, result, data):
    assert result["steps"] == STEPS
    assert result["tokens"] == STEPS * 4 * 64
    assert result["tokens_per_s"] > 0
    assert result["val_loss_on"] != result["val_loss_off"]
    metrics = (single / "metrics.jsonl").read_text()
    assert f'"val_loss_on": {result["val_loss_on"]}' in metrics
    assert pretrain(single, data, 1, *validated(data)) == result
    assert (single / "metrics.jsonl").read_text() == metrics


def test_a_bounded_run_that_lost_its_last_checkpoint_ends_with_one(data, tmp_path):
    """The number of steps is measured over the first 20, wherever a run continues."""
    bounds = ("--trainer.max_minutes=1e-6", "--trainer.max_steps=1000", "--trainer.save_interval=7")
    plain = ("--model.dec_cross_attention=[]", *bounds)
    last = tmp_path / "checkpoints" / "step-00000020.json"
    for _ in range(2):
        assert pretrain(tmp_path, data, 1, *plain)["steps"] == 20
        last.unlink()


def test_loss_falls_and_two_ranks_train_as_one(single, data, tmp_path):
    assert pretrain(tmp_path, data, 2, *retrieval_options(data))["world_size"] == 2
    one, two = losses(single), losses(tmp_path)
    assert one.keys() == two.keys() == set(range(1, STEPS + 1))
    assert one[STEPS] < one[1] - 0.3
    assert max(abs(one[step] - two[step]) for step in one) < 1e-3


def test_a_run_that_lost_its_last_checkpoint_repeats_the_steps(single, data, tmp_path):
    pretrain(tmp_path, data, 1, *retrieval_options(data))
    (tmp_path / "checkpoints" / f"step-{STEPS:08d}.json").unlink()
    pretrain(tmp_path, data, 2, *retrieval_options(data))
    whole, resumed = losses(single), losses(tmp_path)
    assert resumed.keys() == whole.keys()
    assert max(abs(whole[step] - resumed[step]) for step in whole) < 1e-3


def test_fitting_retrieval_leaves_the_decoder_as_it_was(data, tmp_path):
    pretrain(tmp_path / "plain", data, 1, "--model.dec_cross_attention=[]")
    fitted = ("--trainable=retrieval", f"--init_url={tmp_path / 'plain'}")
    pretrain(tmp_path / "retro", data, 2, *retrieval_options(data, *fitted))
    plain, retro = load_model(str(tmp_path / "plain")), load_model(str(tmp_path / "retro"))
    weights = dict(plain.named_parameters())
    for name, parameter in retro.named_parameters():
        assert is_retrieval_parameter(name) or torch.equal(parameter, weights[name]), name
    tokens = torch.arange(2, 66)[None]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    assert torch.equal(plain(tokens, mask), retro(tokens, mask))
    new = dict(retro.named_parameters())["layers.1.feed_forward_half.cross_attention.query.bias"]
    assert new.any()


def test_a_modern_model_under_muP_trains_sharded_as_whole_and_resumes(data, tmp_path):
    shapes = tmp_path / "shapes.bsh"
    modern = {"normalization": "rmsnorm", "activation": "swiglu", "bias": False}
    widths = {"hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 1}
    base = ModelConfig(**modern, **widths, cross_attention_gate=True)
    delta = replace(base, hidden_size=8, ffn_hidden_size=16, kv_channels=8)
    base_job = MupShapesConfig(str(shapes), replace(base, kv_channels=16), delta)
    mup_shapes.run(base_job)
    options = [f"--model.{k}={str(v).lower()}" for k, v in modern.items()]
    options += ["--model.cross_attention_gate=true", f"--shape_file={shapes}"]
    options += ["--optim.name=muadamw", "--model.hidden_dropout=0.1"]
    chosen = retrieval_options(data, *options)
    pretrain(tmp_path / "whole", data, 2, *chosen)
    pretrain(tmp_path / "parts", data, 2, *chosen)
    (tmp_path / "parts" / "checkpoints" / f"step-{STEPS:08d}.json").unlink()
    pretrain(tmp_path / "parts", data, 2, *chosen)
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert whole == parts
    model = load_model(str(tmp_path / "whole"))
    assert model.config.output_width_mult == 2
    gate = dict(model.named_parameters())["layers.1.feed_forward_half.cross_attention.gate"]
    assert gate.abs() > 0


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
