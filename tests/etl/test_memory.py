"""Memory of a task is bounded: a fixed part and a multiple of the longest document."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

FIXED_BYTES = 600 << 20
PER_DOCUMENT_BYTE = 16

TASK = """
import json, sys
from pathlib import Path
import numpy as np
from etl.duplicates import _describe_split
from etl.records import Fields, RecordReader
from etl.retmmap import Layout
from etl.sources import find_sources, plan_splits
from etl.split_writer import SplitTask
from etl.splits import Fate, SplitRule, parse_weights
from etl.storage import StageFolder
from etl.tokenizer import load_tokenizer

path, output, tokenizer_url, is_near = sys.argv[1:]
sources, tokenizer = find_sources([path]), load_tokenizer(tokenizer_url)
task = SplitTask(
    StageFolder(output), RecordReader(tuple(sources), Fields()),
    tuple(map(tuple, plan_splits(sources, 64 << 20))), tokenizer.to_bytes(),
    tokenizer.eod_token, None,
    SplitRule(parse_weights("1,0,0"), 0, {}, True), Layout.of(64, np.uint16),
    Layout.of(64, np.uint16, retrieval_db=True), True, False, True,
)
documents = tokens = 0
seen = set()
for index in range(len(task.splits)):
    fates = {}
    for batch in _describe_split(task, index, is_near == "near"):
        for node, high, low in zip(*(batch.column(n).to_pylist() for n in ("node", "high", "low"))):
            head = np.asarray([high, low], "<i8").tobytes()
            if head in seen:
                fates[node & 0xFFFFFFFF] = Fate("duplicates_dropped", head, False, False)
            seen.add(head)
    assert task.write(index, fates) is None
    counts = task.folder.record(task.record_name(index))["counts"]
    documents += counts.get("documents", 0)
    tokens += counts.get("tokens", 0)
# Not ru_maxrss: a new process inherits that of the one that started it.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) << 10
splits = len(task.splits)
print(json.dumps({"peak": peak, "documents": documents, "tokens": tokens, "splits": splits}))
"""


def run(path, tokenizer_url, tmp_path, near):
    command = [sys.executable, "-c", TASK, str(path), str(tmp_path / "out"), tokenizer_url, near]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_document_of_200_mb_takes_a_bounded_multiple_of_its_size(tokenizer_url, tmp_path):
    path = tmp_path / "a.jsonl"
    words = "the harbor light of the old town turns slowly over the water and back again. "
    size = 200 << 20
    with open(path, "w") as file:
        file.write('{"text": "')
        for start in range(0, size, len(words) * 1000):
            file.write((words * 1000)[: size - start])
        file.write('"}\n')
    found = run(path, tokenizer_url, tmp_path, "near")
    assert found["documents"] == 1
    assert found["peak"] < FIXED_BYTES + PER_DOCUMENT_BYTE * size


def test_a_file_of_1_gb_takes_a_bounded_amount(tokenizer_url, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        json.dumps({"text": f"{i} " + "the harbor light of the old town " * 300}) + "\n"
        for i in range(100)
    ]
    block = "".join(lines)
    with open(path, "w") as file:
        for _ in range(-(-(1 << 30) // len(block))):
            file.write(block)
    assert path.stat().st_size >= 1 << 30
    found = run(path, tokenizer_url, tmp_path, "equal")
    assert found["documents"] == 100
    assert found["splits"] == 17
    assert found["peak"] < FIXED_BYTES
