"""What preparation says about inputs as they come, and that everything else arrives."""

import gzip
import json
from dataclasses import replace

import pytest

from etl.prepare import PrepareConfig, prepare
from etl.sources import InputError
from tests.etl.test_prepare import datasets, no_session, texts_of

pytestmark = pytest.mark.spark

GOOD = {"text": "good"}
LINES = {
    "broken.jsonl": (b'{"text": "cut', "not JSON"),
    "key.jsonl": (b'{"body": "x"}', "no field 'text'"),
    "type.jsonl": (b'{"text": 5}', "field 'text' is a int, expected a string"),
    "utf8.jsonl": (b'{"text": "\xff\xfe"}', "not JSON: str is not valid UTF-8"),
    "raw_nul.jsonl": (b'{"text": "a\x00b"}', "unexpected control character"),
    "empty_text.jsonl": (b'{"text": " "}', "field 'text' is empty"),
}
KEPT = {
    "bom.jsonl": (b'\xef\xbb\xbf{"text": "with a mark"}\n', ["with a mark"]),
    "crlf.jsonl": (b'{"text": "one line"}\r\n\r\n{"text": "another"}\r\n', ["one line", "another"]),
    "nul.jsonl": (b'{"text": "a\\u0000b"}\n', ["a\x00b"]),
    "no_newline.jsonl": (b'{"text": "first"}\n{"text": "last"}', ["first", "last"]),
    "empty.jsonl": (b"", []),
    "emoji.jsonl": ('{"text": "\U0001f600\U0001f680"}\n'.encode(), ["\U0001f600\U0001f680"]),
    "forged.jsonl": (b'{"text": "<|endoftext|> inside"}', ["<|endoftext|> inside"]),
}


@pytest.fixture
def config(tokenizer_url, tmp_path):
    return PrepareConfig(
        input_urls=str(tmp_path / "in"),
        output_url=str(tmp_path / "out"),
        tokenizer_url=tokenizer_url,
        splits_string="1,0,0",
        chunk_size=8,
    )


def test_bad_lines_are_named_and_everything_else_arrives(config, spark, tokenizer_url, tmp_path):
    (tmp_path / "in").mkdir()
    for i, (name, (line, _)) in enumerate(LINES.items()):
        good = json.dumps({"text": f"good {i}"}).encode()
        (tmp_path / "in" / name).write_bytes(good + b"\n" + line + b"\n")
    for name, (content, _) in KEPT.items():
        (tmp_path / "in" / name).write_bytes(content)
    result = prepare(config, lambda: spark)
    expected = [f"good {i}" for i in range(len(LINES))]
    expected += [text for _, texts in KEPT.values() for text in texts]
    assert sorted(texts_of(datasets(result)["train"], tokenizer_url)) == sorted(expected)
    assert sum(result["skipped"].values()) == len(LINES)
    rejects = [
        json.loads(line)
        for path in (tmp_path / "out").rglob("rejects/*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len(rejects) == len(LINES)
    for entry in rejects:
        _, reason = LINES[entry["file"].rpartition("/")[2]]
        assert reason in entry["reason"]
        assert entry["offset"] == len(b'{"text":"good 0"} \n')


@pytest.mark.parametrize(
    ("files", "inputs", "message"),
    [
        ({"a.jsonl": b"", "b.jsonl": b""}, ["in"], "all 2 input files are empty"),
        ({"a.jsonl": b"{}"}, ["in", "in/a.jsonl"], "among the inputs more than once"),
        ({"a.csv": b"x"}, ["in/a.csv"], "expected a file ending in"),
    ],
)
def test_inputs_that_cannot_be_meant_stop_before_spark_starts(
    config, files, inputs, message, tmp_path
):
    (tmp_path / "in").mkdir()
    for name, content in files.items():
        (tmp_path / "in" / name).write_bytes(content)
    urls = [str(tmp_path / path) for path in inputs]
    with pytest.raises(InputError, match=message):
        prepare(replace(config, input_urls=urls), no_session)


def test_a_folder_without_inputs_and_a_cut_file_are_named(config, spark, tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(FileNotFoundError, match=r"/in: no file, no folder with"):
        prepare(config, no_session)
    packed = gzip.compress(json.dumps(GOOD).encode() * 100)
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(packed[:-9])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: damaged or incomplete gzip"):
        prepare(config, lambda: spark)
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_only_records_that_cannot_be_used_are_no_dataset(config, spark, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("nonsense\n" * 3)
    result = prepare(config, lambda: spark)
    assert result["datasets"] == {}
    assert sum(result["skipped"].values()) == 3
