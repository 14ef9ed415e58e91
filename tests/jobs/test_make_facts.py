"""The job that writes facts, with a tokenizer that cuts their words into pieces."""

import json
import re
import subprocess
import sys
from math import log
from pathlib import Path

import pytest

from demo.facts import ANSWER_PATTERN, VALUES
from etl.tokenizer import load_tokenizer
from jobs.make_facts import MakeFactsConfig, run

COUNTS = {"train": 20, "validation": 3, "test": 5}


@pytest.fixture(scope="module")
def config(tokenizer_url, tmp_path_factory):
    url = str(tmp_path_factory.mktemp("facts") / "facts.jsonl")
    return MakeFactsConfig(url, tokenizer_url, 16, **COUNTS, style="sentences", seed=0)


@pytest.fixture(scope="module")
def result(config):
    return run(config)


@pytest.fixture(scope="module")
def questions(result):
    with open(result["output_url"]) as file:
        records = [json.loads(line) for line in file]
    return {split: [r["text"] for r in records if r["split"] == split] for split in COUNTS}


def test_entropy_is_that_of_all_answers_over_their_tokens(config, result, questions):
    tokenizer = load_tokenizer(config.tokenizer_url)
    nats = sum(log(len(values)) for values in VALUES.values())
    for split, texts in questions.items():
        answers = [" " + answer for text in texts for answer in re.findall(ANSWER_PATTERN, text)]
        pieces = [tokenizer.token_bytes[i] for e in tokenizer.encode_batch(answers) for i in e.ids]
        tokens = sum(piece != b" " for piece in pieces)
        assert tokens > len(answers)
        expected = {"places": COUNTS[split], "answer_tokens": tokens}
        entropy = pytest.approx(COUNTS[split] * nats / tokens)
        assert result["splits"][split] == {**expected, "entropy": entropy}


def test_first_chunk_is_full_before_the_first_answer(config, questions):
    tokenizer = load_tokenizer(config.tokenizer_url)
    for text in (text for texts in questions.values() for text in texts):
        [encoded] = tokenizer.encode_batch([text.split("\n")[0]])
        assert len(encoded.ids) >= config.chunk_size


def test_as_a_program_it_writes_the_same_file_and_says_the_same(config, result, tmp_path):
    options = {"output_url": str(tmp_path / "facts.jsonl"), "tokenizer_url": config.tokenizer_url}
    arguments = [f"--{name}={value}" for name, value in (options | COUNTS).items()]
    command = [sys.executable, "-m", "jobs.make_facts", "--chunk_size=16", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(ended.stdout.splitlines()[-1])
    assert said == {**result, "output_url": options["output_url"]}
    written = Path(options["output_url"])
    assert written.read_bytes() == Path(config.output_url).read_bytes()
    assert list(tmp_path.iterdir()) == [written]
