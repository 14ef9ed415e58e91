"""A run killed at random moments, over and over, ends with the weights of one that is not."""

import random
import time
from pathlib import Path

import pytest

from tests.ranks import Ranks, train
from tests.training_job import assert_equal_tensors, job, metrics, tensors

pytestmark = [pytest.mark.dist, pytest.mark.slow]
RANKS, KILLS, STEPS = 2, 12, 60


def is_saving(checkpoints):
    """Whether there is a folder of a checkpoint that no record announces yet."""
    names = [path.name for path in checkpoints.glob("step-*")]
    records = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    return any(name.rpartition("-")[0] not in records for name in names if ".json" not in name)


def kill_at_random(ranks, random_numbers, checkpoints):
    """Kills one rank or all, at a random time or during a save; False if the job ended before."""
    victims = range(RANKS) if random_numbers.random() < 0.5 else [random_numbers.randrange(RANKS)]
    deadline = time.monotonic() + random_numbers.uniform(0.2, 1.5)
    wait_for_save = random_numbers.random() < 0.4
    while all(p.is_alive() for p in ranks.processes):
        late = time.monotonic() > deadline
        if late and (not wait_for_save or is_saving(checkpoints)):
            ranks.kill(victims)
            ranks.wait()
            return True
        time.sleep(0.001)
    ranks.wait()
    return False


@pytest.mark.parametrize("asynchronous", [False, True])
def test_kills_at_random_moments_leave_no_trace(asynchronous, data, tmp_path):
    changes = {
        "trainer__max_steps": STEPS,
        "checkpoint__interval": 1,
        "checkpoint__asynchronous": asynchronous,
        "model__hidden_dropout": 0.1,
    }
    train(job(data, tmp_path / "whole", **changes), RANKS, tmp_path / "logs")
    config = job(data, tmp_path / "killed", **changes)
    checkpoints = Path(config.output_url) / "checkpoints"
    random_numbers = random.Random(asynchronous)
    kills = 0
    while kills < KILLS:
        ranks = Ranks(config, RANKS, tmp_path / "logs")
        if not kill_at_random(ranks, random_numbers, checkpoints):
            break
        kills += 1
    print(f"{kills} kills")
    assert kills >= KILLS
    assert train(config, RANKS, tmp_path / "logs")["steps"] == STEPS
    assert metrics(tmp_path / "killed")[-1]["step"] == STEPS
    expected = {line["step"]: line["loss"] for line in metrics(tmp_path / "whole")}
    assert {line["step"]: line["loss"] for line in metrics(tmp_path / "killed")} == expected
    assert_equal_tensors(tensors(tmp_path / "killed"), tensors(tmp_path / "whole"))
    assert len(list(checkpoints.iterdir())) == 4
