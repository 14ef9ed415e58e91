import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from etl.cache import CACHE_VARIABLE
from etl.storage import StageFolder, StoredFile, filesystem_of
from indexing.inspection import describe, summary
from indexing.join_plan import JoinConfig
from indexing.joined_manifest import load_manifest
from jobs import inspect_data
from jobs.command_line import run_job
from tests.plain_join import join_plainly
from tests.s3_server import s3_server
from tests.small_data import CHUNK_SIZE

LENGTH, K = 64, 3


@pytest.fixture(scope="module")
def config(data, tmp_path_factory):
    return JoinConfig(
        dataset_url=data.training.url,
        map_url=data.map.url,
        retrieval_url=data.retrieval.url,
        output_url=str(tmp_path_factory.mktemp("joined")),
        seq_length=LENGTH,
        K_keep=K,
        samples_per_block=4,
        blocks_per_shard=3,
        compression="zstd",
    )


@pytest.fixture(scope="module")
def joined(config):
    return join_plainly(config)


def run(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        run_job("Look.", inspect_data.InspectConfig, inspect_data.run, list(args))
    return ended.value.code, *capsys.readouterr()


def inspected(capsys, url, *args):
    code, out, err = run(capsys, f"--url={url}", *args)
    assert code == 0, err
    assert out.count("\n") == 1
    return json.loads(out), err


def bytes_under(url, *patterns):
    return sum(path.stat().st_size for pattern in patterns for path in Path(url).glob(pattern))


def test_a_dataset_is_described_by_what_it_holds(data, capsys):
    found, err = inspected(capsys, data.training.url)
    documents, sizes = data.training.documents, data.training.chunk_to_doc
    assert (found["kind"], found["version"], found["split"]) == ("dataset", 1, "train")
    assert found["fingerprint"] == data.training.manifest.fingerprint
    assert found["parents"]["tokenizer"] == data.training.manifest.tokenizer_fingerprint
    assert found["documents"] == len(documents) == 43
    assert found["tokens"] == documents["num_tokens"].sum()
    assert found["chunks"] == data.training.num_chunks
    assert sizes([found["chunks"] - 1])[0] == found["documents"] - 1
    assert (found["dtype"], found["chunk_size"]) == ("uint16", CHUNK_SIZE)
    shards = [
        sum(getattr(shard, part).bytes for part in ("bin", "idx", "docs", "info", "chunk_bytes"))
        for shard in data.training.manifest.shards
    ]
    assert found["shards"] == {
        "number": 3,
        "min_bytes": min(shards),
        "max_bytes": max(shards),
    }
    assert found["bytes"] == sum(shards) + data.training.manifest.tokenizer.bytes
    assert "documents_shown" not in found
    assert found["fingerprint"] in err
    assert f"{found['tokens']:,}" in err


@pytest.mark.parametrize("split", ["training", "retrieval"])
def test_documents_are_shown_as_their_text_across_shards(data, capsys, split):
    dataset = getattr(data, split)
    count = dataset.manifest.shards[0].num_documents + 2
    shown = inspected(capsys, dataset.url, f"--show={count}")[0]["documents_shown"]
    everything = describe(dataset.url, 1000)["documents_shown"]
    assert shown == everything[:count]
    corpus = Path(data.training.url).parents[1] / "corpus.jsonl"
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    cut = [entry["tokens"] > 512 for entry in everything]
    assert sum(cut) == 1
    for entry, text, is_cut in zip(everything, texts, cut, strict=True):
        assert text.startswith(entry["text"])
        assert (entry["text"] == text) != is_cut


def test_a_map_is_described_by_its_rows(data, capsys):
    found, _ = inspected(capsys, data.map.url, "--show=2")
    rows = data.map.load().neighbors
    assert (found["kind"], found["format"], found["K"]) == ("knn_map", "KNNRETM", 4)
    assert found["fingerprint"] == data.map.fingerprint
    assert found["parents"] == {
        "training": data.training.manifest.fingerprint,
        "retrieval": data.retrieval.manifest.fingerprint,
        "index": None,
    }
    assert (found["chunks"], found["chunk_start"]) == (len(rows), 0)
    assert found["fill"] == {"rows": len(rows), "rate": 0.75, "rows_without": 0}
    assert found["bytes"] == data.map.load().path.stat().st_size
    assert [entry["neighbors"] for entry in found["chunks_shown"]] == rows[:2].tolist()


def test_a_joined_dataset_is_described_by_its_blocks(data, config, joined, capsys):
    found, _ = inspected(capsys, joined.url, "--show=5")
    manifest = joined.manifest
    assert (found["kind"], found["format"], found["version"]) == ("joined", "retromill-joined", 1)
    assert found["fingerprint"] == manifest.fingerprint
    assert found["parents"]["map"] == data.map.fingerprint
    assert found["parents"]["training"] == data.training.manifest.fingerprint
    assert (found["seq_length"], found["K"], found["chunk_size"]) == (LENGTH, K, CHUNK_SIZE)
    assert found["samples"] == -(-(data.training.num_chunks * CHUNK_SIZE - 1) // LENGTH)
    assert found["blocks"] == -(-found["samples"] // 4)
    assert found["bytes"] == bytes_under(joined.url, "*.joined", "*.idx")
    shown = found["samples_shown"]
    blocks = [joined.block(i) for i in range(2)]
    for name in ("tokens", "neighbor_ids", "neighbor_tokens"):
        expected = np.concatenate([getattr(block, name) for block in blocks])[:5].tolist()
        assert [sample[name] for sample in shown] == expected
    plain = join_plainly(replace(config, compression="none"))
    ratio = bytes_under(plain.url, "*.joined") / bytes_under(joined.url, "*.joined")
    assert found["compression"]["name"] == "zstd"
    assert found["compression"]["ratio"] == pytest.approx(ratio, rel=0.02)
    uncompressed = describe(plain.url)
    assert uncompressed["compression"]["ratio"] == 1
    assert len(describe(plain.url, 1000)["samples_shown"]) == found["samples"]


def test_chunks_beyond_the_dataset_are_no_missing_neighbors(data, config):
    joined = join_plainly(replace(config, seq_length=16 * data.training.num_chunks + 160, K_keep=1))
    assert joined.manifest.num_samples == 1
    fill = describe(joined.url)["fill"]
    assert fill["rows"] == data.training.num_chunks
    present = joined.block(0).neighbor_ids >= 0
    assert fill["rate"] == present.sum() / data.training.num_chunks


def test_remote_artefacts_are_described_like_local_ones(data, joined, monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    with s3_server(monkeypatch):
        filesystem = filesystem_of("s3://bucket")[0]
        filesystem.mkdir("bucket")
        for url in (data.training.url, data.map.url, joined.url):
            name = Path(url).name
            filesystem.put(url, f"bucket/{name}", recursive=True)
            found = describe(f"s3://bucket/{name}", 2)
            assert found == describe(url, 2) | {"url": f"s3://bucket/{name}"}
        with pytest.raises(FileNotFoundError, match="found none of"):
            describe("s3://bucket/nothing")


def test_other_folders_are_refused_with_what_was_expected(data, capsys, tmp_path):
    for url in (tmp_path, tmp_path / "missing", Path(data.training.url).parent):
        code, out, err = run(capsys, f"--url={url}")
        assert (code, out) == (2, "")
        for name in (str(url), "manifest.json", "knn.json", "joined.json", "jobs.prepare_data"):
            assert name in err


def test_a_negative_number_to_show_is_refused(data, capsys):
    code, _, err = run(capsys, f"--url={data.training.url}", "--show=-1")
    assert code == 2
    assert "expected 0 or more" in err


@pytest.mark.parametrize("damage", [lambda data: data[:-8], lambda data: b"X" + data[1:]])
def test_a_damaged_map_is_refused(data, capsys, tmp_path, damage):
    shutil.copytree(data.map.url, tmp_path / "map")
    file = StoredFile(**data.map.manifest["files"]["map"])
    path = Path(StageFolder(str(tmp_path / "map")).path_of(file.name))
    path.chmod(0o644)
    path.write_bytes(damage(path.read_bytes()))
    code, _, err = run(capsys, f"--url={tmp_path / 'map'}")
    assert code == 2
    assert path.name in err


def test_a_summary_is_short_whatever_is_shown(joined):
    lines = summary(describe(joined.url, 2)).splitlines()
    assert max(map(len, lines)) < 300
    assert load_manifest(joined.url).fingerprint in "".join(lines)
