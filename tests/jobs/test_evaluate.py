"""Evaluation of trained models on a held-out dataset, as a job."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from etl.dataset import Dataset
from indexing.leaks import LeakError
from jobs import evaluate, pretrain
from jobs.evaluate import EvaluateConfig
from model import evaluation_run
from model.evaluation_report import conditions_of
from tests.ranks import Ranks
from tests.small_data import Data, chosen_map, prepare_plainly, write_map
from tests.training_job import job, plain

WEIGHTS, SPLITS = "1,0,1", ("train", "retrieval", "test")
CONDITIONS = ("on", "off", "random", "oracle", "k=1", "k=2", "k=8", "database=0", "database=0.5")


@pytest.fixture(scope="module")
def split_data(tokenizer_url, tmp_path_factory):
    """(training data with its map, the test dataset, its map)."""
    folder = tmp_path_factory.mktemp("split")
    training, retrieval, test = prepare_plainly(folder, tokenizer_url, WEIGHTS, SPLITS)
    for name in ("train", "test"):
        (folder / name).mkdir()
    data = Data(training, retrieval, chosen_map(folder / "train", training, retrieval))
    ids = np.random.default_rng(1).integers(0, retrieval.num_chunks, (test.num_chunks, 4))
    ids[retrieval.is_all_pad(ids.ravel()).reshape(ids.shape)] = 0
    ids[test.is_all_pad(np.arange(test.num_chunks))] = -1
    return data, test, write_map(folder / "test", test, retrieval, ids)


@pytest.fixture(scope="module")
def config(split_data, tmp_path_factory):
    data, test, built = split_data
    runs = tmp_path_factory.mktemp("runs")
    pretrain.run(job(data, runs / "retro"))
    pretrain.run(job(data, runs / "plain", **plain()))
    return EvaluateConfig(
        run_url=str(runs / "retro"),
        dataset_url=test.url,
        retrieval_url=data.retrieval.url,
        map_url=built.url,
        conditions=CONDITIONS,
        equal_step_url=str(runs / "plain"),
        seq_length=64,
        stride=32,
        batch_size=2,
    )


@pytest.fixture(scope="module")
def result(config):
    return evaluate.run(config)


def numbers(result):
    return {name: result[name] for name in conditions_of(result)}


def test_every_condition_is_measured_on_the_same_tokens(result, split_data):
    _, test, _ = split_data
    assert conditions_of(result) == [*(c for c in CONDITIONS if c != "k=8"), "equal_step_decoder"]
    assert result["not_measured"] == {"k=8": "the map holds 4 neighbors a chunk"}
    tokens = test.get_chunk(np.arange(test.num_chunks), continuation=False)
    texts = int((tokens != test.manifest.pad_id).sum()) - test.num_documents
    for found in numbers(result).values():
        assert found["tokens"] == texts
        assert found["before_first_retrieval"]["tokens"] > 0


def test_bits_per_byte_are_of_the_stored_bytes(result, split_data):
    """But for the first token of each document, which nothing predicts."""
    _, test, _ = split_data
    stored = test.chunk_bytes(np.arange(test.num_chunks)).sum()
    off = result["off"]
    counted = off["loss"] * off["tokens"] / np.log(2) / off["bpb"]
    assert 0.9 * stored < counted < stored


def test_an_emptied_database_is_off_and_the_trained_number_of_neighbors_is_on(result):
    without = lambda found: {k: v for k, v in found.items() if k != "difference_from_off"}
    assert without(result["database=0"]) == result["off"]
    assert result["database=0"]["difference_from_off"]["mean"] == 0
    assert result["k=2"] == result["on"]
    assert len({found["loss"] for found in numbers(result).values()}) == len(CONDITIONS) - 2


def test_differences_are_those_of_the_losses(result):
    for name, found in numbers(result).items():
        if name != "off":
            difference = found["difference_from_off"]
            assert difference["mean"] == pytest.approx(found["loss"] - result["off"]["loss"])
            assert difference["low"] <= difference["mean"] <= difference["high"]
    against = result["equal_step_decoder"]["difference_of_on"]["mean"]
    expected = result["on"]["loss"] - result["equal_step_decoder"]["loss"]
    assert against == pytest.approx(expected)


def test_buckets_add_up_to_the_whole(result):
    for kind in ("seen", "in_sight"):
        buckets = result["overlap"][kind]["buckets"]
        assert sum(b["tokens"] for b in buckets) == result["on"]["tokens"]
        loss = sum(b["loss_b"] for b in buckets)
        assert loss == pytest.approx(result["on"]["loss"] * result["on"]["tokens"])
        assert result["overlap"][kind]["bpb"]["on"][-1]["bpb"] == pytest.approx(
            result["on"]["bpb"], rel=1e-4
        )
    assert sum(result["leaks"]["counts"].values()) == 0


def test_what_is_missing_is_said(result, config):
    assert result["missing"] == ["equal_time_decoder"]
    said = " ".join(result["says"])
    assert "equal_time_url" in said
    assert "equal_step_url" not in said
    assert "k=8 was not measured" in said
    assert "database=0.5 is not exact" in said


def test_two_evaluations_are_identical_and_two_ranks_give_the_same(result, config, tmp_path):
    assert numbers(evaluate.run(config)) == numbers(result)
    found = Ranks(config, 2, tmp_path, module="jobs.evaluate").result()
    for name, one in numbers(result).items():
        assert found[name]["loss"] == pytest.approx(one["loss"], abs=1e-6)
        assert found[name]["tokens"] == one["tokens"]


def test_a_finished_evaluation_is_read_and_its_page_is_whole(result, config, tmp_path, monkeypatch):
    stored = replace(config, output_url=str(tmp_path))
    first = evaluate.run(stored)
    assert numbers(first) == numbers(result)
    page = Path(first["report_url"]).read_text()
    assert "</html>" in page
    assert "equal_step_decoder" in page
    monkeypatch.setattr(evaluation_run, "chunk_losses", None)
    assert evaluate.run(stored) == first
    more = replace(stored, conditions=("on", "off"))
    assert numbers(evaluate.run(more)) == {
        name: numbers(result)[name] for name in ("on", "off", "equal_step_decoder")
    }


def _evaluate(config):
    evaluation_run._BLOCK_BATCHES = 1
    evaluate.run(config)
    os._exit(0)


@pytest.mark.parametrize("moment", [1, 9])
def test_a_killed_evaluation_continues_where_it_was(moment, result, config, tmp_path, monkeypatch):
    """kill -9 when so many parts are stored."""
    stored = replace(config, output_url=str(tmp_path))
    process = multiprocessing.get_context("spawn").Process(target=_evaluate, args=(stored,))
    process.start()
    parts = lambda: list(tmp_path.glob("losses-*/*-000*.json"))
    deadline = time.monotonic() + 60
    while len(parts()) < moment and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = len(parts())
    assert kept >= moment
    assert not list(tmp_path.glob("evaluation-*/report.json"))
    measured = []
    measure = evaluation_run.chunk_losses
    monkeypatch.setattr(evaluation_run, "_BLOCK_BATCHES", 1)
    monkeypatch.setattr(
        evaluation_run, "chunk_losses", lambda *args: measured.append(0) or measure(*args)
    )
    assert numbers(evaluate.run(stored)) == numbers(result)
    assert len(measured) == len(parts()) - kept


def test_damaged_parts_are_refused(config, tmp_path):
    stored = replace(config, output_url=str(tmp_path), conditions=("off",), equal_step_url=None)
    evaluate.run(stored)
    part = next(tmp_path.glob("losses-*/*.npy"))
    part.write_bytes(part.read_bytes()[:-8] + bytes(8))
    [report] = tmp_path.glob("evaluation-*/report.json")
    report.unlink()
    with pytest.raises(ValueError, match="the file is damaged"):
        evaluate.run(stored)


def test_a_map_that_leaks_ends_the_job(config, split_data, tmp_path):
    data, test, built = split_data
    ids = np.array(built.load().neighbors)
    pads = np.flatnonzero(test.is_all_pad(np.arange(test.num_chunks)))
    ids[pads[0]] = 0
    leaking = write_map(tmp_path, test, data.retrieval, ids)
    with pytest.raises(LeakError, match="all_pad_chunk: 4"):
        evaluate.run(replace(config, map_url=leaking.url))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"map_url": None}, "belong to a model with retrieval"),
        ({"conditions": ("on", "best")}, "no condition 'best'"),
        ({"stride": 40}, "multiples of chunk_size"),
        ({"sources": "nowhere"}, "nothing to score"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes, message, config):
    with pytest.raises(ValueError, match=message):
        evaluate.run(replace(config, **changes))


def test_a_plain_decoder_is_measured_off_and_compared_with_nothing(config):
    alone = replace(
        config, run_url=config.equal_step_url, map_url=None, retrieval_url=None, equal_step_url=None
    )
    found = evaluate.run(alone)
    assert conditions_of(found) == ["off"]
    assert found["missing"] == []
    assert found["leaks"] is None
    with pytest.raises(ValueError, match="is no plain decoder to compare"):
        evaluate.run(replace(config, equal_step_url=config.run_url))
    json.dumps(found)
    assert Dataset(config.dataset_url).manifest.split == "test"


def test_training_in_a_process_leaves_its_arithmetic_as_it_was(config):
    assert np.full(64, 1e-310).sum() > 0
