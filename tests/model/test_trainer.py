"""Training over ranks: the same at any world size, exact after any interruption."""

import resource
import signal
import time
from dataclasses import replace

import pytest
import torch

from jobs import evaluate, pretrain
from jobs.evaluate import EvaluateConfig
from model import trainer
from model.trainer import rank_share
from tests.ranks import Ranks, train
from tests.training_job import (
    STEPS,
    assert_equal_tensors,
    job,
    losses,
    metrics,
    plain,
    tensors,
)

pytestmark = pytest.mark.dist
COPYING = {
    "retrieval_start": "copying",
    "trainer__copy_warmup_steps": 4,
    "trainer__copy_warmup_tokens": "random",
    "trainer__retrieval_off_share": 0.55,
    "optim__retrieval_lr_ratio": 0.1,
}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Uninterrupted runs by number of ranks."""
    runs = {}

    def run(ranks):
        if ranks not in runs:
            output = tmp_path_factory.mktemp(f"whole-{ranks}")
            train(job(data, output / "run"), ranks, output)
            runs[ranks] = output / "run"
        return runs[ranks]

    return run


def test_the_samples_of_a_step_are_the_same_in_order_at_any_world_size():
    for step in (0, 7):
        for ranks in (1, 2, 4, 8):
            shares = [rank_share(16, step, rank, ranks) for rank in range(ranks)]
            places = [first + i for first, count in shares for i in range(count)]
            assert places == list(range(16 * step, 16 * step + 16))


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_ranks_and_replicas_train_as_one_process(ranks, replicas, whole, data, tmp_path):
    train(job(data, tmp_path / "run", parallel__replicas=replicas), ranks, tmp_path)
    one, many = losses(whole(1)), losses(tmp_path / "run")
    assert one.keys() == many.keys() == set(range(1, STEPS + 1))
    assert one[STEPS] < one[1] - 0.3
    assert max(abs(one[step] - many[step]) for step in one) < 1e-6 * one[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__activation_checkpointing": "full", "model__hidden_dropout": 0.1},
        {"checkpoint__asynchronous": True},
        {"parallel__precision": "bf16"},
        COPYING,
    ],
    ids=["dropout, recomputed", "asynchronous", "bf16", "copying"],
)
def test_a_stopped_run_continues_bit_for_bit(changes, data, tmp_path):
    config = job(data, tmp_path / "whole", **changes)
    train(config, 2, tmp_path)
    parts = replace(config, output_url=str(tmp_path / "parts"))
    short = replace(parts, trainer=replace(parts.trainer, stop_after_steps=3))
    result = train(short, 2, tmp_path)
    assert (result["steps"], result["samples"], result["stopped"]) == (3, 24, "stop_after_steps")
    result = train(parts, 2, tmp_path)
    assert (result["steps"], result["samples"], result["stopped"]) == (STEPS, 48, None)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert_equal_tensors(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))


def test_a_copy_warm_up_is_the_same_on_any_number_of_ranks(data, tmp_path):
    """Its random tokens too; the retrieval parts have another learning rate afterwards only, and
    the last step is one without retrieval."""
    for ranks in (1, 2):
        train(job(data, tmp_path / f"{ranks}", **COPYING), ranks, tmp_path)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert max(abs(one[step] - two[step]) for step in one) < 1e-6 * one[1]
    lines = {line["step"]: line for line in metrics(tmp_path / "1") if "lr" in line}
    ratios = [lines[step]["lr/decay0.1_x0.1"] / lines[step]["lr"] for step in (3, 4, 5, 6)]
    assert ratios == pytest.approx([1, 1, 0.1, 0.1])
    with_neighbors = [lines[step]["neighbor_tokens_per_s"] > 0 for step in range(1, STEPS + 1)]
    assert with_neighbors == [True, True, True, True, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (plain(optim__retrieval_lr_ratio=0.5), "retrieval_lr_ratio and trainer.retrieval_off"),
        (plain(trainer__retrieval_off_share=0.5), "retrieval_off_share have no effect"),
        ({"trainer__retrieval_off_share": 1.0}, "expected 0 or more, below 1"),
        (
            {"trainer__retrieval_off_share": 0.5, "trainable": "retrieval", "init_url": "some"},
            "nothing to train in a frozen decoder",
        ),
        (plain(trainer__copy_warmup_steps=2), "copy_warmup_steps needs neighbors"),
        ({"trainer__copy_warmup_tokens": "random"}, "no effect without copy_warmup_steps"),
        ({"retrieval_start": "copying", "init_url": "somewhere"}, "leave out init_url"),
    ],
    ids=str,
)
def test_options_of_retrieval_that_change_nothing_are_refused(changes, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        pretrain.run(job(data, tmp_path / "run", **changes))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2)])
def test_a_run_continues_on_another_number_of_ranks(before, after, whole, data, tmp_path):
    config = job(data, tmp_path / "run")
    short = replace(config, trainer=replace(config.trainer, stop_after_steps=3))
    train(short, before, tmp_path)
    train(config, after, tmp_path)
    expected, found = losses(whole(1)), losses(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert max(abs(found[step] - expected[step]) for step in found) < 1e-6 * expected[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_ends_all(number, data, tmp_path):
    config = job(data, tmp_path / "run", trainer__max_steps=100_000, checkpoint__interval=10**6)
    ranks = Ranks(config, 2, tmp_path)
    _until(lambda: len(_metrics(config)) >= 3)
    ranks.stop(number, [1])
    result = ranks.result()
    assert result["stopped"] == "another rank"
    assert len(metrics(config.output_url)) == result["steps"] >= 3
    shorter = replace(config, trainer=replace(config.trainer, stop_after_seconds=1e-9))
    again = train(shorter, 2, tmp_path)
    assert (again["steps"], again["stopped"]) == (result["steps"] + 1, "stop_after_seconds")


def _metrics(config):
    try:
        return metrics(config.output_url)
    except (FileNotFoundError, ValueError):
        return []


def _until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _one_step_overflows():
    original, calls = trainer.token_losses, []

    def overflowing(*arguments):
        calls.append(0)
        return original(*arguments) * (float("inf") if len(calls) == 3 else 1)

    trainer.token_losses = overflowing


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(data, tmp_path):
    changes = plain(trainer__micro_batch_size=8, optim__lr=1e-3, trainer__max_steps=3)
    config = job(data, tmp_path / "run", **changes)
    result = train(config, 1, tmp_path, _one_step_overflows)
    assert (result["steps"], result["skipped_steps"]) == (3, 1)
    assert metrics(tmp_path / "run")[-1]["loss"] is None
    before = job(data, tmp_path / "two", **changes)
    train(replace(before, trainer=replace(before.trainer, stop_after_steps=2)), 1, tmp_path)
    assert_equal_tensors(tensors(tmp_path / "run"), tensors(tmp_path / "two"))


def test_a_run_that_has_diverged_ends_with_the_reason(data, tmp_path):
    changes = plain(optim__lr=1e30, optim__warmup_steps=0, trainer__max_steps=100)
    ranks = Ranks(job(data, tmp_path / "run", **changes), 1, tmp_path)
    assert ranks.wait() == [2]
    assert "20 steps in a row" in ranks.printed()


def test_bf16_keeps_float32_weights(whole, data, tmp_path):
    train(job(data, tmp_path / "run", parallel__precision="bf16"), 2, tmp_path)
    exact, rounded = losses(whole(1)), losses(tmp_path / "run")
    assert {value.dtype for value in tensors(tmp_path / "run").values()} == {torch.float32}
    assert exact != rounded
    assert max(abs(exact[step] - rounded[step]) for step in exact) < 0.05


def test_checkpoints_are_kept_as_asked(data, tmp_path):
    options = {"interval": 1, "keep_last": 2, "keep_every": 3, "asynchronous": True}
    changes = {f"checkpoint__{name}": value for name, value in options.items()}
    train(job(data, tmp_path / "run", trainer__max_steps=8, **plain(**changes)), 1, tmp_path)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert [name for name in names if name.endswith(".json")] == [
        f"step-0000000{step}.json" for step in (3, 6, 7, 8)
    ]
    assert len(names) == 8


def _disk_is_full():
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(asynchronous, data, tmp_path):
    config = job(data, tmp_path / "run", checkpoint__asynchronous=asynchronous)
    train(replace(config, trainer=replace(config.trainer, stop_after_steps=2)), 2, tmp_path)
    expected = tensors(tmp_path / "run")
    ranks = Ranks(config, 2, tmp_path, _disk_is_full)
    assert ranks.wait()[0] == 2
    said = ranks.printed()
    assert "the checkpoint of step 4 could not be written: OSError: [Errno 27]" in said
    assert "that of step 2 is whole" in said
    assert_equal_tensors(tensors(tmp_path / "run"), expected)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3
    train(replace(config, trainer=replace(config.trainer, stop_after_steps=1)), 2, tmp_path)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 4
    assert train(config, 2, tmp_path)["steps"] == STEPS
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 4


def test_metrics_say_what_users_watch(whole):
    line = metrics(whole(2))[-1]
    assert line["tokens"] == STEPS * 8 * 64
    assert line["neighbor_tokens_per_s"] == pytest.approx(4 * line["tokens_per_s"])
    assert line["lr/decay0.1_x1"] == line["lr"] > 0
    assert line["tflops_per_device"] > 0
    assert line["mfu"] is None
    assert 0 <= line["data_wait"] < 1
    assert line["memory_bytes"] > 1e8
    assert line["grad_norm"] > 0


def test_a_run_shows_itself_in_tensorboard_wandb_and_a_trace(data, tmp_path):
    changes = {"metrics__wandb_project": "retromill-test", "metrics__tensorboard": True}
    config = job(data, tmp_path / "run", trainer__profile_steps=(2, 3), **plain(**changes))
    train(config, 2, tmp_path, environment={"WANDB_MODE": "offline"})
    run = tmp_path / "run"
    assert list((run / "tensorboard").glob("events.*"))
    [written] = run.glob("wandb/offline-run-*/*.wandb")
    assert b"grad_norm" in written.read_bytes()
    assert sorted(path.name for path in (run / "profile").iterdir()) == [
        "rank-0.json.gz",
        "rank-1.json.gz",
    ]


def test_several_training_sets_and_a_split_by_documents(data, tmp_path):
    one, other = data.training.url, data.training.url
    sets = {"data__train_url": [one, other], "data__train_map_url": [data.map.url] * 2}
    result = train(job(data, tmp_path / "two", data__train_weights=[3, 1], **sets), 2, tmp_path)
    assert result["steps"] == STEPS
    weights = "70,20,10"
    split = plain(data__splits_string=weights, trainer__val_samples=4)
    result = train(job(data, tmp_path / "split", **split), 2, tmp_path)
    assert 0 < result["val_loss_off"] < 10
    scored = EvaluateConfig(
        str(tmp_path / "split"), data.training.url, splits_string=weights, seq_length=64
    )
    assert 0 < evaluate.run(scored)["off"]["loss"] < 10
    with pytest.raises(ValueError, match="is the train dataset"):
        evaluate.run(replace(scored, splits_string=None))
