"""A small dataset, its retrieval dataset and a KNN map of chosen neighbors; no engine."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from etl.dataset import Dataset
from etl.manifest import NAME, DatasetManifest, shard_from_json
from etl.records import Fields, RecordReader
from etl.retmmap import Layout
from etl.sources import find_sources, plan_splits
from etl.split_writer import SplitTask
from etl.splits import SplitRule, parse_weights
from etl.storage import StageFolder, create_json
from etl.tokenizer import load_tokenizer
from indexing import knn_manifest
from indexing.knn_manifest import BuiltMap, open_map
from indexing.knn_map import write_knn_map
from tests.texts import write_corpus

CHUNK_SIZE = 16


@dataclass(frozen=True)
class Data:
    training: Dataset
    retrieval: Dataset
    map: BuiltMap


def prepare_plainly(folder, tokenizer_url, weights="1,0,0", splits=("train", "retrieval")):
    """Datasets of three shards each, by the task function alone."""
    write_corpus(folder / "corpus.jsonl")
    sources = find_sources([str(folder / "corpus.jsonl")])
    tokenizer = load_tokenizer(tokenizer_url)
    task = SplitTask(
        folder=StageFolder(str(folder / "data")),
        reader=RecordReader(tuple(sources), Fields()),
        splits=tuple(map(tuple, plan_splits(sources, -(-sources[0].bytes // 3)))),
        tokenizer_data=tokenizer.to_bytes(),
        eod_token=tokenizer.eod_token,
        encoder=None,
        rule=SplitRule(parse_weights(weights), 0, {}, True),
        training=Layout.of(CHUNK_SIZE, np.uint16),
        retrieval=Layout.of(CHUNK_SIZE, np.uint16, retrieval_db=True),
        append_eod=True,
        nemo_padding=True,
        fail_on_bad_record=True,
    )
    for i in range(3):
        task.write(i, {})
    return tuple(commit(task, tokenizer, split) for split in splits)


def commit(task, tokenizer, split):
    entries = [task.folder.record(task.record_name(i))["shards"][split] for i in range(3)]
    shards = [shard_from_json(entry) for entry in entries]
    folder = StageFolder(task.folder.path_of(split))
    local = Path(folder.path_of("scratch"), "tokenizer.json")
    local.parent.mkdir()
    local.write_bytes(task.tokenizer_data)
    [stored] = folder.store("tokenizer", local)
    layout = task.layout_of(split)
    manifest = DatasetManifest(
        split=split,
        chunk_size=layout.chunk_size,
        stride=layout.stride,
        dtype_code=layout.dtype_code,
        pad_id=tokenizer.pad_id,
        eod_id=tokenizer.eod_id,
        eod_token=tokenizer.eod_token,
        vocab_size=tokenizer.vocab_size,
        tokenizer=stored,
        tokenizer_fingerprint=tokenizer.fingerprint,
        encoder=None,
        split_rule={},
        held_back=0,
        sources=("corpus.jsonl",),
        shards=tuple(shards),
    )
    create_json(folder.path_of(NAME), manifest.to_json())
    return Dataset(folder.url)


def chosen_map(folder, training, retrieval):
    """Four neighbors a chunk: pseudo-random chunks, the last one missing."""
    ids = np.random.default_rng(0).integers(0, retrieval.num_chunks, (training.num_chunks, 4))
    ids[:, 3] = -1
    return write_map(folder, training, retrieval, ids)


def write_map(folder, training, retrieval, ids, chunk_start=0, **details):
    """A finished map of neighbor ids [chunks, K], of chunks from chunk_start on; details are more
    entries of its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = StageFolder(str(folder / "map"))
    path = folder / "map.knn"
    with open(path, "wb") as file:
        write_knn_map(file, ids, chunk_start)
    [stored] = stage.store("map", path)
    value = {
        "files": {"map": asdict(stored)},
        "training_fingerprint": training.manifest.fingerprint,
        "retrieval_fingerprint": retrieval.manifest.fingerprint,
        "k": ids.shape[1],
        **details,
    }
    stage.publish(knn_manifest.NAME.removesuffix(".json"), value)
    return open_map(stage.url)
