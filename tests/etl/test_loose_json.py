import gzip
import hashlib
import io
import json
import random

import pytest
import zstandard

from etl import loose_json
from etl.compressed import CompressedError
from etl.records import Document, Fields, RecordReader, Reject
from etl.sources import InputError, Range, find_sources, plan_splits


def lines_of(texts):
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def zstd_with_checksum(content):
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def read(sources, splits):
    """Records of all splits in order, as (source, offset, text or reason)."""
    found = []
    for ranges in splits:
        for record in RecordReader(tuple(sources), Fields()).read(ranges):
            found.append((record.source, record.offset, getattr(record, "text", None)))
    return found


def parse(line, source, offset, split_key=None):
    """What becomes of one line."""
    found = loose_json._parse(line, offset)
    return RecordReader((), Fields(split_key=split_key)).document(found, source, offset)


def random_texts(generator, count):
    letters = "ab é\n\u2028\U0001f600"
    return [
        "x" + "".join(generator.choices(letters, k=generator.randrange(60))) for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(10))
def test_splits_cut_anywhere_give_every_line_once_and_in_order(tmp_path, seed):
    generator = random.Random(seed)
    texts = random_texts(generator, 36)
    raw = [lines_of(texts[:15]), b"", lines_of(texts[15:16]), lines_of(texts[16:])]
    raw[seed % 4] = raw[seed % 4].removesuffix(b"\n")  # a last line without a newline counts
    for i, content in enumerate(raw):
        (tmp_path / f"{i}.jsonl").write_bytes(content)
    sources = find_sources([str(tmp_path)])
    whole = read(sources, plan_splits(sources, 1 << 30))
    assert [text for _, _, text in whole] == texts
    for source, offset, text in whole:
        assert json.loads(raw[source][offset:].split(b"\n")[0])["text"] == text
    for split_bytes in [1, 2, 7, *(generator.randrange(1, 2000) for _ in range(6))]:
        assert read(sources, plan_splits(sources, split_bytes)) == whole


def test_split_edges_on_and_around_every_newline(tmp_path):
    raw = lines_of(["a", "bb", "ccc"])
    (tmp_path / "a.jsonl").write_bytes(raw)
    sources = find_sources([str(tmp_path / "a.jsonl")])
    whole = read(sources, [[Range(0, 0, len(raw))]])
    for cut in range(len(raw) + 1):
        assert read(sources, [[Range(0, 0, cut)], [Range(0, cut, len(raw))]]) == whole, cut


def test_splits_are_balanced_and_cover_every_byte_once(tmp_path):
    for i, size in enumerate((10, 250, 0, 90)):
        (tmp_path / f"{i}.jsonl").write_bytes(b"x" * size)
    sources = find_sources([str(tmp_path)])
    splits = plan_splits(sources, 100)
    sizes = [sum(part.stop - part.start for part in ranges) for ranges in splits]
    assert sizes == [100, 100, 100, 50]
    covered = [(part.source, byte) for ranges in splits for part in ranges for byte in span(part)]
    assert covered == [(s.source, byte) for s in wholes(sources) for byte in span(s)]
    with pytest.raises(InputError, match="split_bytes is 0"):
        plan_splits(sources, 0)


def span(part):
    return range(part.start, part.stop)


def wholes(sources):
    return [Range(i, 0, source.bytes) for i, source in enumerate(sources)]


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".jsonl.gz", gzip.compress), (".json.zst", zstandard.compress), (".json", bytes)],
)
def test_compressed_files_go_whole_to_one_split(tmp_path, suffix, pack):
    texts = random_texts(random.Random(1), 100)
    (tmp_path / f"a{suffix}").write_bytes(pack(lines_of(texts)))
    (tmp_path / "b.jsonl").write_bytes(lines_of(["last"]))
    sources = find_sources([str(tmp_path)])
    splits = plan_splits(sources, 50)
    if suffix != ".json":
        assert [part for ranges in splits for part in ranges if part.source == 0] == [
            Range(0, 0, sources[0].bytes)
        ]
    found = read(sources, splits)
    assert [text for _, _, text in found] == [*texts, "last"]
    assert found[1][1] == len(lines_of(texts[:1]))  # offsets count uncompressed bytes


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstd_with_checksum)], ids=["gz", "zst"]
)
def test_compressed_files_of_many_frames_are_read_whole_and_cut_ones_refused(
    tmp_path, suffix, pack
):
    texts = [random.Random(i).randbytes(200_000).hex() for i in range(3)]
    packed = [pack(lines_of([text])) for text in texts]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"".join(packed))
    sources = find_sources([str(path)])
    assert [text for _, _, text in read(sources, plan_splits(sources, 99))] == texts
    damaged = bytearray(packed[0])
    damaged[1000:1100] = bytes(100)
    for content in (packed[0][:-1], packed[0] + packed[1][: len(packed[1]) // 2], damaged):
        path.write_bytes(content)
        with pytest.raises(CompressedError, match="damaged or incomplete"):
            read(find_sources([str(path)]), plan_splits(sources, 99))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not JSON"),
        (b"plain words", "not JSON"),
        (b'{"text": "\xff\xfe"}', "not JSON"),
        (b'{"text": "\\ud800"}', "not JSON"),
        (b'["text"]', "a JSON list, expected an object"),
        (b"null", "a JSON NoneType, expected an object"),
        (b'{"body": "x"}', "no field 'text'"),
        (b'{"text": 5}', "field 'text' is a int, expected a string"),
        (b'{"text": null}', "field 'text' is null"),
        (b'{"text": ["a"]}', "field 'text' is a list, expected a string"),
        (b'{"text": ""}', "field 'text' is empty"),
        (b'{"text": " \\n\\t"}', "field 'text' is empty"),
        (b'{"text": "a", "split": "dev"}', "field 'split' is 'dev', expected train"),
        (b'{"text": "a", "split": 1}', "field 'split' is '1', expected train"),
    ],
)
def test_a_record_that_cannot_be_used_says_why(line, reason):
    found = parse(line, 3, 77, "split")
    assert isinstance(found, Reject)
    assert (found.source, found.offset) == (3, 77)
    assert reason in found.reason


@pytest.mark.parametrize(
    "text", ["\U0001f600\U0001f680", "a\x00b", "<|endoftext|>", "x" * 5_000_000, " padded "]
)
def test_unusual_documents_are_kept_as_they_are(text):
    found = parse(json.dumps({"text": text}).encode(), 0, 5)
    assert isinstance(found, Document)
    assert found.text == text
    assert found.content_hash == hashlib.blake2b(text.encode(), digest_size=16).digest()


def test_a_document_of_5_mb_across_many_splits_is_read_once(tmp_path):
    texts = ["before", "y" * 5_000_000, "after"]
    (tmp_path / "a.jsonl").write_bytes(lines_of(texts))
    sources = find_sources([str(tmp_path)])
    assert [text for _, _, text in read(sources, plan_splits(sources, 300_000))] == texts


def test_a_split_inside_a_huge_line_reads_no_further_than_its_end():
    file = io.BytesIO(b"x" * 10_000 + b"\n" + lines_of(["next"]))
    assert loose_json._first_line(file, Range(0, 100, 300)) == 300
    assert file.tell() == 299
    assert loose_json._first_line(file, Range(0, 9_990, 10_001)) == 10_001
    assert loose_json._first_line(file, Range(0, 9_990, 10_002)) == 10_001


def test_byte_order_mark_blank_lines_and_windows_line_ends_are_no_records(tmp_path):
    raw = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}\r\n\n'
    (tmp_path / "a.jsonl").write_bytes(raw)
    sources = find_sources([str(tmp_path)])
    assert [text for _, _, text in read(sources, plan_splits(sources, 5))] == ["a", "b"]


def test_the_split_field_is_optional_in_a_record():
    kept = [
        parse(line, 0, 1, "split").split
        for line in (
            b'{"text": "a", "split": "test"}',
            b'{"text": "a"}',
            b'{"text":"a","split":null}',
        )
    ]
    assert kept == ["test", None, None]


def test_sources_are_found_in_folders_and_globs_and_sorted(tmp_path):
    for name in ("b/2.jsonl", "b/1.jsonl.gz", "a.json", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = [source.name for source in find_sources([str(tmp_path)])]
    assert names == ["a.json", "b/1.jsonl.gz", "b/2.jsonl"]
    assert [s.name for s in find_sources([f"{tmp_path}/b/*"])] == ["1.jsonl.gz", "2.jsonl"]


def test_a_source_has_another_version_when_its_content_changes(tmp_path):
    path = tmp_path / "a.jsonl"
    versions = []
    for content in (b"one", b"two", b"one"):
        path.write_bytes(content)
        versions.append(find_sources([str(path)])[0].version)
    assert versions[0] == versions[2] != versions[1]


def test_lists_of_globs_are_read_and_files_of_other_kinds_are_named(tmp_path, caplog):
    for name in ("a/1.jsonl", "a/2.jsonl", "a/notes.md", "b/3.txt", "b/4.parquet", "c/5.json.zst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    urls = [f"{tmp_path}/a", f"{tmp_path}/b/*", f"{tmp_path}/c/5*"]
    expected = ["a/1.jsonl", "a/2.jsonl", "b/3.txt", "b/4.parquet", "c/5.json.zst"]
    assert [source.name for source in find_sources(urls)] == expected
    assert "1 files of other kinds are not read" in caplog.text
    assert "notes.md" in caplog.text


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(["one", "two"]))
    sources = find_sources([str(path)])
    splits = plan_splits(sources, 1 << 20)
    path.write_bytes(lines_of(["one", "two", "three"]))
    with pytest.raises(InputError, match=r"a\.jsonl: changed while the job ran"):
        read(sources, splits)


def test_inputs_that_cannot_be_meant_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "a.md").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="absent"):
        find_sources([str(tmp_path / "absent")])
    with pytest.raises(InputError, match="expected a file ending in"):
        find_sources([str(tmp_path / "a.md")])
    with pytest.raises(InputError, match="empty"):
        find_sources([str(tmp_path / "a.jsonl")])
    with pytest.raises(InputError, match="more than once"):
        find_sources([str(tmp_path), str(tmp_path / "a.jsonl")])
