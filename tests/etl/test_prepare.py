import gzip
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from etl.dataset import Dataset
from etl.manifest import DOCUMENT_DTYPE
from etl.prepare import PrepareConfig, prepare
from etl.records import BadRecordError
from etl.sources import InputError
from etl.tokenizer import load_tokenizer

pytestmark = pytest.mark.spark

WORDS = ["the", "harbor", "light", "of", "town", "over", "water", "😀", "<|endoftext|>"]


def make_texts(count=60):
    generator = random.Random(3)
    return [
        f"{i} " + " ".join(generator.choices(WORDS, k=generator.randrange(1, 40)))
        for i in range(count)
    ]


def write_lines(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two files of 60 documents, ten of them twice; a test and a retrieval document are named."""
    folder = tmp_path_factory.mktemp("corpus")
    records = [{"text": text} for text in make_texts()]
    records[4]["split"], records[5]["split"] = "test", "retrieval"
    write_lines(folder / "a.jsonl", records[:40] + records[:5])
    write_lines(folder / "b.jsonl", records[35:])
    return folder


@pytest.fixture
def config(corpus, tokenizer_url, tmp_path):
    return PrepareConfig(
        input_urls=str(corpus),
        output_url=str(tmp_path / "out"),
        tokenizer_url=tokenizer_url,
        split_key="split",
        splits_string="70,15,15",
        chunk_size=8,
    )


def no_session():
    raise AssertionError("no work is left for Spark")


def datasets(result):
    return {split: Dataset(found["url"]) for split, found in result["datasets"].items()}


def contents(dataset):
    """All that a dataset says: tokens of every chunk id, its document, and each document's hash."""
    ids = np.arange(dataset.num_chunks)
    documents = dataset.documents
    return {
        "chunks": dataset.get_chunk(ids).tolist(),
        "owners": dataset.chunk_to_doc(ids).tolist(),
        "documents": [documents[name].tolist() for name in DOCUMENT_DTYPE.names],
    }


def texts_of(dataset, tokenizer_url):
    tokenizer = load_tokenizer(tokenizer_url)
    found = []
    for i in range(len(dataset.manifest.shards)):
        reader = dataset.shard(i)[0]
        for document in range(reader.num_documents):
            found += tokenizer.decode_batch(reader.get_document(document)[None])
    return found


def test_any_number_of_tasks_gives_the_same_datasets(config, corpus, spark, tmp_path):
    total = sum(path.stat().st_size for path in corpus.iterdir())
    found = {}
    for tasks in (1, 2, 7, 40):
        sized = replace(
            config, split_bytes=-(-total // tasks), output_url=str(tmp_path / f"{tasks}")
        )
        assert abs(prepare(replace(sized, dry_run=True), no_session)["tasks"] - tasks) <= 1
        found[tasks] = datasets(prepare(sized, lambda: spark))
    assert set(found[1]) == {"train", "validation", "test", "retrieval"}
    assert len(found[7]["train"].manifest.shards) > 2
    for split in found[1]:
        expected = contents(found[1][split])
        assert contents(found[2][split]) == expected
        assert contents(found[7][split]) == expected
        assert contents(found[40][split]) == expected


def test_documents_are_split_once_and_held_out_ones_cannot_be_retrieved(
    config, spark, tokenizer_url
):
    result = prepare(config, lambda: spark)
    found = datasets(result)
    texts = {split: texts_of(dataset, tokenizer_url) for split, dataset in found.items()}
    expected = make_texts()
    own = texts["train"] + texts["validation"] + texts["test"]
    assert sorted([*own, expected[5]]) == sorted(expected)  # each once: ten duplicates dropped
    assert result["counts"]["duplicates_dropped"] == 10
    assert result["counts"]["documents"] == 60
    assert sorted(texts["retrieval"]) == sorted([*texts["train"], expected[5]])
    assert expected[4] in texts["test"]
    held_out = np.concatenate([found[split].document_keys for split in ("validation", "test")])
    assert len(held_out) == result["counts"]["held_out"] > 5
    assert not np.isin(held_out, found["retrieval"].document_keys).any()
    by_order = [text for text in expected if text in set(texts["train"])]
    assert texts["train"] == by_order  # the first of equal texts stays, order is that of the input


def test_documents_end_once_and_are_padded(config, spark):
    for split, dataset in datasets(prepare(config, lambda: spark)).items():
        manifest = dataset.manifest
        reader = dataset.shard(0)[0]
        for i in range(reader.num_documents):
            tokens = reader.get_document(i)
            [end] = np.flatnonzero(tokens == manifest.eod_id)
            assert (tokens[end + 1 :] == manifest.pad_id).all()
            assert len(tokens) - end - 1 < 8
            assert not (tokens[:end] == manifest.pad_id).any()
        assert manifest.num_tokens == sum(
            int((dataset.shard(i)[0].tokens != manifest.pad_id).sum())
            for i in range(len(manifest.shards))
        )
        assert reader.retrieval_db == (split == "retrieval")


def test_duplicates_can_be_kept(config, spark):
    result = prepare(replace(config, duplicates="keep"), lambda: spark)
    assert result["counts"]["documents"] == 70
    assert result["counts"]["duplicates_dropped"] == 0


def test_a_finished_preparation_does_nothing_again(config, spark):
    first = prepare(config, lambda: spark)
    before = {path: path.stat().st_mtime_ns for path in Path(config.output_url).rglob("*")}
    assert prepare(config, no_session) == first
    assert {p: p.stat().st_mtime_ns for p in Path(config.output_url).rglob("*")} == before
    other = prepare(replace(config, chunk_size=16), lambda: spark)
    assert other["url"] != first["url"]


def test_a_killed_attempt_is_continued_and_its_leftovers_do_not_matter(
    config, corpus, spark, tmp_path
):
    config = replace(config, split_bytes=2000)
    expected = prepare(replace(config, output_url=str(tmp_path / "whole")), lambda: spark)
    finished = prepare(config, lambda: spark)
    folder = Path(finished["url"])
    # As if killed: no commit, one split never finished, one shard cut, half-written scratch.
    for name in (
        "corpus.json",
        "splits/00001.json",
        *(f"{s}/manifest.json" for s in finished["datasets"]),
    ):
        (folder / name).unlink()
    cut = next((folder / "train").glob("00002*.bin"))
    cut.write_bytes(cut.read_bytes()[:-1])
    untouched = next((folder / "train").glob("00000*.bin"))
    written = untouched.stat().st_mtime_ns
    (folder / "train" / ".scratch-1").mkdir()
    (folder / "train" / ".scratch-1" / "train.bin").write_bytes(b"half")
    (folder / "train" / "00001-0123456789abcdef.bin").write_bytes(b"an attempt nobody announced")
    again = prepare(config, lambda: spark)
    assert again["counts"] == expected["counts"]
    for split, found in expected["datasets"].items():
        assert found["fingerprint"] == again["datasets"][split]["fingerprint"]
        assert contents(Dataset(again["datasets"][split]["url"])) == contents(Dataset(found["url"]))
    assert untouched.stat().st_mtime_ns == written
    assert not list(folder.rglob(".scratch-*"))


@pytest.fixture
def bad_corpus(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n{"text": 5}\nnot json\n{"text": "also good"}\n')
    return str(path)


def test_bad_records_are_skipped_counted_and_listed(config, bad_corpus, spark):
    result = prepare(replace(config, input_urls=bad_corpus), lambda: spark)
    assert result["counts"]["documents"] == 2
    assert sum(result["skipped"].values()) == 2
    [rejects] = Path(result["url"], "rejects").iterdir()
    listed = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [entry["offset"] for entry in listed] == [17, 29]
    assert all(entry["file"].endswith("bad.jsonl") for entry in listed)
    assert "is a int" in listed[0]["reason"]
    assert "not JSON" in listed[1]["reason"]


def test_a_bad_record_can_be_made_an_error(config, bad_corpus, spark):
    strict = replace(config, input_urls=bad_corpus, on_bad_record="fail")
    with pytest.raises(BadRecordError, match=r"bad\.jsonl at byte 17: field 'text' is a int"):
        prepare(strict, lambda: spark)
    assert not list(Path(config.output_url).rglob("corpus.json"))
    assert not list(Path(config.output_url).rglob("manifest.json"))


def test_a_run_that_failed_is_continued_where_it_was_and_skipping_is_not_forgotten(
    config, corpus, spark, tmp_path
):
    lines = (corpus / "a.jsonl").read_bytes() + b"nonsense\n" + (corpus / "b.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(lines)
    config = replace(config, input_urls=str(tmp_path / "a.jsonl"), split_bytes=3000)
    strict = replace(config, on_bad_record="fail")
    with pytest.raises(BadRecordError, match=r"a\.jsonl at byte \d+: not JSON"):
        prepare(strict, lambda: spark)
    names_before = job_names(spark)
    assert any(re.fullmatch(r"prepare: read and hash \d+ splits, .*", n) for n in names_before)
    assert any(re.fullmatch(r"prepare: tokenize and write \d+ splits", n) for n in names_before)
    result = prepare(config, lambda: spark)
    new = job_names(spark)[len(names_before) :]
    assert set(new) == {"prepare: tokenize and write 1 splits"}
    assert result["counts"]["duplicates_dropped"] == 10
    with pytest.raises(BadRecordError, match=r"skipped 1 records \(1: not JSON"):
        prepare(strict, no_session)


def job_names(spark):
    """Names of all jobs in the Spark UI, first to last; their stages bear the same."""
    store = spark.sparkContext._jsc.sc().statusStore()
    jobs = store.jobsList(None)
    found = sorted((jobs.apply(i) for i in range(jobs.size())), key=lambda job: job.jobId())
    return [job.description().get() if job.description().isDefined() else "" for job in found]


def test_two_runs_at_once_give_one_result(config, spark):
    with ThreadPoolExecutor(2) as pool:
        config = replace(config, split_bytes=3000)
        first, second = pool.map(lambda _: prepare(config, lambda: spark), range(2))
    assert first == second
    for dataset in datasets(first).values():
        assert len(contents(dataset)["documents"][0]) == dataset.num_documents
    folder = Path(first["url"])
    assert not list(folder.rglob(".scratch-*"))
    assert not (folder / "fates").exists() or not list((folder / "fates").iterdir())


def test_documents_need_no_end_token(config, spark, tokenizer_url):
    without = replace(config, append_eod=False, splits_string="1,0,0")
    train = datasets(prepare(without, lambda: spark))["train"]
    eod = train.manifest.eod_id
    assert not any(
        (train.shard(i)[0].tokens == eod).any() for i in range(len(train.manifest.shards))
    )
    assert train.chunk_bytes(np.arange(train.num_chunks)).sum() == train.manifest.text_bytes
    texts = texts_of(train, tokenizer_url)
    assert texts == [t for i, t in enumerate(make_texts()) if i not in (4, 5)]


def test_outputs_are_never_taken_for_inputs(config, corpus, spark, tmp_path):
    write_lines(tmp_path / "in.json", [{"text": "one"}])
    glob = replace(config, input_urls=f"{tmp_path}/**/*.json", output_url=str(tmp_path / "out"))
    prepare(glob, lambda: spark)
    with pytest.raises(InputError, match=r"input files lie in output_url"):
        prepare(glob, no_session)


def test_a_file_that_was_cut_is_an_error_without_sparks_traceback(config, corpus, spark, tmp_path):
    packed = gzip.compress((corpus / "a.jsonl").read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-20])
    cut = replace(config, input_urls=str(tmp_path / "cut.jsonl.gz"))
    with pytest.raises(InputError, match=r"^\S+cut\.jsonl\.gz: damaged or incomplete gzip"):
        prepare(cut, lambda: spark)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_urls": "absent.jsonl"}, FileNotFoundError, "absent"),
        ({"tokenizer_url": "absent"}, FileNotFoundError, "absent"),
        ({"splits_string": "1,2"}, InputError, "three or four weights"),
        ({"chunk_size": 0}, ValueError, "chunk_size is 0"),
        ({"stride": 3}, ValueError, "stride 3"),
        ({"stride": 4, "retrieval_db": False}, InputError, "retrieval_db is false"),
        ({"eod_token": "</s>"}, ValueError, "</s>"),
    ],
)
def test_wrong_options_are_refused_before_spark_starts(config, change, error, message):
    with pytest.raises(error, match=message):
        prepare(replace(config, **change), no_session)
    assert not Path(config.output_url).exists()
