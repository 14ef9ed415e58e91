import gzip
from hashlib import blake2b

import orjson
import pytest
import zstandard

from demo.plan import (
    CHUNK_SIZE,
    SPLITS_STRING,
    Plan,
    first_question,
    make_plan,
    split_seed,
    train_tokenizer,
    write_facts,
    write_text,
)
from etl.compressed import CompressedError
from etl.sources import InputError
from etl.splits import assign_split, parse_weights
from etl.tokenizer import load_tokenizer

LINES = b"".join(orjson.dumps({"body": f"text {i} " * 50}) + b"\n" for i in range(30))
BAD = b'{"body": "cut\n'
PLAN = Plan(chunks_per_s=1.0, text_bytes=1 << 20, places=5)
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def corpus(tmp_path, content, suffix="", plan=PLAN):
    (tmp_path / f"own.jsonl{suffix}").write_bytes(content)
    url = str(tmp_path / f"own.jsonl{suffix}")
    return write_text(tmp_path / "corpus", plan, url)


@pytest.mark.parametrize("suffix", PACKED)
def test_lines_of_the_users_file_arrive_as_they_are(tmp_path, suffix):
    text = corpus(tmp_path, PACKED[suffix](LINES + BAD + LINES), suffix)
    assert text.read_bytes() == LINES + BAD + LINES


def test_lines_beyond_what_the_demo_reads_are_left_out_and_counted(tmp_path, caplog):
    long = orjson.dumps({"body": "x" * 20_000}) + b"\n"
    plan = Plan(chunks_per_s=1.0, text_bytes=len(LINES) + 5, places=5)
    assert corpus(tmp_path, long + LINES + long, plan=plan).read_bytes() == LINES
    assert "left 2 lines out" in caplog.text


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_file_is_an_error_and_leaves_no_corpus(tmp_path, suffix):
    with pytest.raises(CompressedError, match="damaged or incomplete"):
        corpus(tmp_path, PACKED[suffix](LINES)[:-9], suffix)
    assert not list((tmp_path / "corpus").glob("*"))


def test_files_that_are_no_lines_are_refused(tmp_path):
    (tmp_path / "own.txt").write_bytes(LINES)
    with pytest.raises(InputError, match="reads loose JSON lines"):
        write_text(tmp_path / "corpus", PLAN, str(tmp_path / "own.txt"))


@pytest.fixture
def trained(tmp_path):
    text = corpus(tmp_path, BAD + LINES)
    (tmp_path / "tokenizer.json").write_bytes(train_tokenizer(text, "body", 300))
    return str(tmp_path / "tokenizer.json")


def test_the_tokenizer_learns_from_usable_documents_and_knows_every_byte(trained):
    tokenizer = load_tokenizer(trained)
    [encoded] = tokenizer.encode_batch(["🙂 \x00 text 5"])
    assert tokenizer.decode_batch(encoded.ids[None]) == ["🙂 \x00 text 5"]
    assert tokenizer.vocab_size > 256 + 20


@pytest.mark.parametrize("own", [True, False])
def test_answers_come_after_the_first_chunk_and_stand_in_its_neighbors_continuation(
    trained, tokenizer_url, tmp_path, own
):
    """Whatever the tokenizer, the first answer is asked for when retrieval has happened."""
    url = tokenizer_url if own else trained
    tokenizer = load_tokenizer(url)
    facts = write_facts(tmp_path / "corpus", PLAN, "body", url)
    for record in map(orjson.loads, facts.read_bytes().splitlines()):
        introduction, *answers = record["body"].split("\n")
        [whole] = tokenizer.encode_batch([introduction])
        if answers:
            assert len(whole.ids) >= CHUNK_SIZE
            shorter = introduction[: introduction.rindex(". ") + 1]
            assert len(tokenizer.encode_batch([shorter])[0].ids) < CHUNK_SIZE
        elif not own:
            assert CHUNK_SIZE < len(whole.ids) <= 2 * CHUNK_SIZE
    assert first_question(facts, "body").count("\n") == 1


def test_a_faster_machine_gets_more_text_between_the_bounds():
    slow, usual, fast = (make_plan(rate, False) for rate in (1.0, 150.0, 1e4))
    assert 400_000 == slow.text_bytes < usual.text_bytes < fast.text_bytes == 8 << 20
    assert slow.places < usual.places < fast.places


def test_text_of_ones_own_gets_more_time_within_the_same_bounds():
    slow, usual, fast = (make_plan(rate, True) for rate in (1.0, 100.0, 1e4))
    assert 400_000 == slow.text_bytes < usual.text_bytes < fast.text_bytes == 8 << 20
    default = make_plan(100.0, False)
    assert (usual.text_bytes > 2 * default.text_bytes, usual.places) == (True, default.places)


@pytest.mark.parametrize("documents", [2, 3, 30])
def test_a_handful_of_documents_is_trained_on_and_held_out(tmp_path, documents):
    lines = LINES.splitlines(keepends=True)[:documents]
    text = corpus(tmp_path, BAD.join(lines))
    seed = split_seed(text, "body")
    hashes = [blake2b(orjson.loads(line)["body"].encode(), digest_size=16) for line in lines]
    weights = parse_weights(SPLITS_STRING)
    found = {assign_split(h.digest(), weights, seed) for h in hashes}
    assert {"train", "test"} <= found


@pytest.mark.parametrize("lines", [BAD, LINES.splitlines(keepends=True)[0] * 2])
def test_an_input_that_cannot_be_split_is_refused_before_any_work(tmp_path, lines):
    text = corpus(tmp_path, lines)
    with pytest.raises(InputError, match="needs at least 2"):
        split_seed(text, "body")
