import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from etl.loose_json import read_lines
from etl.plain_text import read_text
from etl.records import Document, Fields, RecordReader, Reject
from etl.sources import InputError, Range, find_sources, plan_splits


def read(path, split_bytes=1 << 40, **fields):
    sources = find_sources([str(path)])
    reader = RecordReader(tuple(sources), Fields(**fields))
    return [
        record for ranges in plan_splits(sources, split_bytes) for record in reader.read(ranges)
    ]


def test_details_of_a_record_come_along(tmp_path):
    record = {"body": "text", "id": 7, "src": "here", "title": "On text", "text": "not this"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    [found] = read(tmp_path, text_key="body")
    assert isinstance(found, Document)
    assert (found.text, found.id, found.src, found.title) == ("text", "7", "here", "On text")
    assert found.text_bytes == 4


def test_ftfy_mends_wrongly_decoded_text_only_when_asked(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "schÃ¶n"}))
    assert [d.text for d in read(tmp_path)] == ["schÃ¶n"]
    [mended] = read(tmp_path, apply_ftfy=True)
    assert (mended.text, mended.text_bytes) == ("schön", 6)


@pytest.mark.parametrize("pack", [lambda b: b, gzip.compress, zstandard.compress])
def test_a_plain_text_file_is_one_document(tmp_path, pack):
    suffix = {gzip.compress: ".gz", zstandard.compress: ".zst"}.get(pack, "")
    (tmp_path / f"a.txt{suffix}").write_bytes(pack("\ufeffone\n\ntwo\n".encode()))
    [found] = read(tmp_path, split_bytes=3)
    assert (found.text, found.title) == ("one\n\ntwo\n", f"a.txt{suffix}")


def test_a_text_that_is_not_utf8_or_too_long_says_so(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xff bad")
    [found] = read(tmp_path)
    assert isinstance(found, Reject)
    assert found.reason == "not UTF-8: invalid start byte at byte 5"
    [source] = find_sources([str(tmp_path)])
    assert "more than 4 bytes" in str(read_text(source, max_bytes=4))


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=10)


def test_parquet_rows_are_read_once_whatever_the_split(tmp_path):
    texts = [f"text {i} " + "x" * (i * 7 % 50) for i in range(95)]
    write_parquet(tmp_path / "a.parquet", text=texts, id=list(range(95)), other=[1.5] * 95)
    whole = read(tmp_path)
    assert [(d.text, d.id, d.offset) for d in whole] == [
        (t, str(i), i) for i, t in enumerate(texts)
    ]
    for split_bytes in (100, 777, 2000):
        assert read(tmp_path, split_bytes) == whole


def test_parquet_values_that_are_no_text_are_rejected(tmp_path):
    write_parquet(tmp_path / "a.parquet", text=["good", None, ""])
    reasons = [r.reason for r in read(tmp_path) if isinstance(r, Reject)]
    assert reasons == ["field 'text' is null", "field 'text' is empty"]
    write_parquet(tmp_path / "a.parquet", body=[1, 2])
    assert [r.reason for r in read(tmp_path)] == ["no field 'text'"] * 2
    assert [r.reason for r in read(tmp_path, text_key="body")] == [
        "field 'body' is a int, expected a string"
    ] * 2


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"a\.parquet: damaged, or not Parquet"):
        read(tmp_path)


def test_a_huge_line_is_skipped_without_being_held_and_the_next_ones_are_read(tmp_path):
    lines = [b'{"text": "a"}', b'{"text": "' + b"x" * 5000 + b'"}', b'{"text": "b"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    [source] = find_sources([str(tmp_path)])
    size = source.bytes
    found = list(read_lines(source, Range(0, 0, size), max_bytes=100))
    assert [offset for offset, _ in found] == [0, 14, 5027]
    assert found[0][1] == {"text": "a"}
    assert str(found[1][1]) == "a line of more than 100 bytes"
    for cut in (13, 14, 15, 500, 5026, 5027):
        parts = [Range(0, 0, cut), Range(0, cut, size)]
        again = [entry for part in parts for entry in read_lines(source, part, max_bytes=100)]
        assert [(o, str(v)) for o, v in again] == [(o, str(v)) for o, v in found], cut
