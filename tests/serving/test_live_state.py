"""Live documents that are saved: kills, damage, other tokenizers, several writers."""

import json
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from etl.retmmap import Layout
from etl.storage import StorageError, read_json, write_json
from serving.live_documents import LiveConfig, LiveDocuments
from serving.live_state import LiveState
from tests.serving.word_embedder import WordEmbedder

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    return str(tmp_path / "live") if request.param == "file" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def opened(rules):
    return lambda url, rules=rules, name="words": LiveDocuments(
        rules, WordEmbedder(name=name), LiveConfig(url)
    )


def numbered(*numbers):
    return [{"text": f"document {i} " + "harbor " * i, "id": i, "page": i} for i in numbers]


def answers(live):
    return live.query(["document 3", "the harbor", "document 11 harbor"], 6)


def test_reopened_documents_are_the_same_and_give_the_same_answers(opened, url):
    live = opened(url)
    live.add(numbered(1, 20, 3))
    live.add(numbered(11))
    again = opened(url)
    assert again.list() == live.list()
    assert answers(again).found == answers(live).found
    assert again.add(numbered(5, 20)) == (4, 1)
    assert opened(url).num_documents == 5


def test_a_reset_is_for_good_and_leaves_no_files(opened, url, tmp_path):
    live = opened(url)
    live.add(numbered(1, 2))
    live.reset()
    assert opened(url).is_empty()
    live.add(numbered(4))
    assert [document.name for document in opened(url).list()] == ["4"]
    if "://" not in url:
        files = sorted(p.relative_to(url).parts[0] for p in Path(url).rglob("*") if p.is_file())
        assert files == ["adds", "batches", "batches", "epochs"]


def test_files_that_are_not_its_own_survive_a_reset(opened, tmp_path):
    (tmp_path / "batches").mkdir()
    for name in ("notes.txt", "batches/mine.npy"):
        (tmp_path / name).write_text("x")
    live = opened(str(tmp_path))
    live.add(numbered(1))
    live.reset()
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / "batches/mine.npy").exists()


def test_many_small_additions_are_joined_when_they_are_opened(opened, url):
    live = opened(url)
    for i in range(40):
        live.add(numbered(i + 1))
    again = opened(url)
    assert again.list() == live.list()
    state = LiveState(url, again._identity())
    assert len(state.load()) == 1
    assert answers(opened(url)).found == answers(live).found


def test_a_saved_copy_opens_elsewhere(rules, opened, tmp_path):
    live = LiveDocuments(rules, WordEmbedder())
    live.add(numbered(1, 2, 3))
    live.save(str(tmp_path / "copy"))
    assert opened(str(tmp_path / "copy")).list() == live.list()
    with pytest.raises(StorageError, match="holds live documents already"):
        live.save(str(tmp_path / "copy"))


def states(before, operation):
    """What may be there after an operation that was not acknowledged: nothing of it, or all."""
    return [before, [] if operation == "reset" else before + operation]


def test_killed_processes_leave_what_was_acknowledged_and_at_most_the_one_in_flight_whole(
    opened, tokenizer_url, tmp_path
):
    folder = str(tmp_path / "live")
    command = [sys.executable, "-m", "tests.serving.killed_adds", folder, tokenizer_url, "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    possible, acknowledged, lives, in_flight = [[]], 0, 0, 0
    for line in [json.loads(line) for line in done.stdout.splitlines()]:
        if "opened" in line:
            assert line["opened"] in possible
            possible = [line["opened"]]
            lives += 1
        elif "begins" in line:
            assert len(possible) == 1
            possible = states(possible[0], line["begins"])
            in_flight += 1
        else:
            possible = possible[1:]
            acknowledged += 1
    assert lives == 20
    assert acknowledged > 20
    assert in_flight - acknowledged > 5
    assert [document.text for document in opened(folder).list()] in possible


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize(
    "name", ["batches/*.jsonl", "batches/*.npy", "adds/000000-000000.json", "epochs/*"]
)
def test_damaged_state_is_refused(opened, tmp_path, name, damage):
    live = opened(str(tmp_path))
    live.add(numbered(1, 2))
    live.add(numbered(3))
    damage(sorted(tmp_path.glob(name))[0])
    with pytest.raises(StorageError, match=str(tmp_path)):
        opened(str(tmp_path))


def test_an_edited_record_is_refused(opened, tmp_path):
    opened(str(tmp_path)).add(numbered(1, 2))
    record = str(tmp_path / "adds/000000-000000.json")
    write_json(record, read_json(record) | {"batch": None})
    with pytest.raises(StorageError, match="does not match its fingerprint"):
        opened(str(tmp_path))


def test_another_chunk_size_embedder_or_tokenizer_is_refused_with_both_named(opened, rules, url):
    opened(url).add(numbered(1))
    wide = replace(rules, layout=Layout.of(32, np.uint16, True))
    with pytest.raises(StorageError, match="chunk_size: 16 there, 32 here"):
        opened(url, wide)
    with pytest.raises(StorageError, match="fingerprint: words-16 there, others-16 here"):
        opened(url, name="others")
    other = replace(rules, tokenizer=OtherTokenizer(rules.tokenizer))
    known = rules.tokenizer.fingerprint
    with pytest.raises(StorageError, match=f"tokenizer_fingerprint: {known} there, ffff here"):
        opened(url, other)


class OtherTokenizer:
    """The same ids under another fingerprint."""

    fingerprint = "ffff"

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


def test_a_second_writer_is_refused(opened, url):
    one, other = opened(url), opened(url)
    one.add(numbered(1))
    with pytest.raises(StorageError, match="another process wrote there"):
        other.add(numbered(2))
    fresh = opened(url)
    one.reset()
    with pytest.raises(StorageError, match="another process wrote there"):
        fresh.add(numbered(3))
    assert other.is_empty()
    assert opened(url).is_empty()
