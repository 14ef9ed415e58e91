"""The whole path on facts whose entropy is known: from the generator to the evaluation.

A decoder is trained without retrieval, then retrieval is fitted to it; and a model is trained with
retrieval from scratch. What the evaluation searches comes from the jobs of index and map, by the
real embedder. In training, where that would take a minute, a chunk's neighbor is the statement that
begins with the same chunk, which is what the embedder finds for all held-out places.
"""

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.facts import ANSWER_PATTERN, VALUES, guess_entropy, make_facts
from etl.records import Fields, RecordReader
from etl.retmmap import Layout
from etl.sources import find_sources, plan_splits
from etl.split_writer import SplitTask
from etl.splits import SplitRule, parse_weights
from etl.storage import StageFolder
from etl.tokenizer import EOD_TOKENS, load_tokenizer
from indexing.cluster import ClusterConfig
from indexing.knn_manifest import open_map
from jobs import build_index, build_knn_map, evaluate, pretrain
from jobs import make_facts as make_facts_job
from tests.indexing.job_runs import EMBEDDER
from tests.small_data import Data, commit, write_map
from tests.training_job import job, plain

pytestmark = pytest.mark.slow
CHUNK_SIZE, TRAIN, TEST = 24, 4000, 100
SEQ_LENGTH = 4 * CHUNK_SIZE
ENTROPY = guess_entropy() / len(VALUES)
CONDITIONS = ("on", "off", "random", "oracle")
CHANGES = {
    "data__seq_length": SEQ_LENGTH,
    "data__neighbors": 1,
    "model__hidden_size": 64,
    "model__ffn_hidden_size": 128,
    "model__num_attention_heads": 1,
    "model__kv_channels": 64,
    "model__dec_num_layers": 2,
    "model__init_method_std": 0.1,
    "trainer__global_batch_size": 16,
    "trainer__micro_batch_size": 16,
    "optim__lr": 5e-3,
    "optim__warmup_steps": 10,
    "checkpoint__interval": 1000,
    "metrics__interval": 50,
}


def train_tokenizer(path):
    """Byte-level BPE in which every word of the facts is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=[EOD_TOKENS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    others = make_facts(1000, 0, 0, lambda text: len(text) > 99, seed=1, style="pairs")
    tokenizer.train_from_iterator((fact["text"] for fact in others), trainer)
    tokenizer.save(str(path))


def prepare(folder, lines, tokenizer, split):
    """The split's dataset and the retrieval dataset. The lines are shuffled, so that each of the
    three shards has documents of both."""
    folder.mkdir()
    (folder / "facts.jsonl").write_text("".join(random.Random(0).sample(lines, len(lines))))
    sources = find_sources([str(folder / "facts.jsonl")])
    task = SplitTask(
        folder=StageFolder(str(folder / "data")),
        reader=RecordReader(tuple(sources), Fields(split_key="split")),
        splits=tuple(map(tuple, plan_splits(sources, -(-sources[0].bytes // 3)))),
        tokenizer_data=tokenizer.to_bytes(),
        eod_token=tokenizer.eod_token,
        encoder=None,
        rule=SplitRule(parse_weights("1,0,0"), 0, {}, True),
        training=Layout.of(CHUNK_SIZE, np.uint16),
        retrieval=Layout.of(CHUNK_SIZE, np.uint16, retrieval_db=True),
        append_eod=True,
        nemo_padding=True,
        fail_on_bad_record=True,
    )
    for i in range(3):
        assert task.write(i, {}) is None
    return commit(task, tokenizer, split), commit(task, tokenizer, "retrieval")


def first_chunks(dataset):
    """[documents, chunk_size] the tokens that name a place."""
    return dataset.get_chunk(dataset.document_first_chunk[:-1], continuation=False)


def statement_map(folder, training, retrieval):
    """The neighbor of a question document's first chunk is that of the statement with the same
    tokens; other chunks have none."""
    is_statement = ~np.isin(retrieval.document_keys, training.document_keys)
    firsts = retrieval.document_first_chunk[:-1][is_statement]
    names = [row.tobytes() for row in first_chunks(retrieval)[is_statement]]
    statements = dict(zip(names, firsts, strict=True))
    ids = np.full((training.num_chunks, 1), -1, np.int64)
    asking = [statements[row.tobytes()] for row in first_chunks(training)]
    ids[training.document_first_chunk[:-1], 0] = asking
    return write_map(folder, training, retrieval, ids)


def searched_map(folder, queries, retrieval):
    """By the jobs, with the real embedder."""
    options = {"embedder": EMBEDDER, "cluster": ClusterConfig("none")}
    index = build_index.BuildIndexConfig("all", retrieval.url, str(folder), **options)
    index_url = build_index.run(index)["index_url"]
    places = (queries.url, index_url, retrieval.url, str(folder))
    knn = build_knn_map.BuildKNNMapConfig("all", *places, **options)
    return open_map(build_knn_map.run(knn)["map_url"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("entropy")


@pytest.fixture(scope="module")
def corpus(folder):
    """What the job says about the file it wrote."""
    train_tokenizer(folder / "tokenizer.json")
    config = make_facts_job.MakeFactsConfig(
        output_url=str(folder / "facts.jsonl"),
        tokenizer_url=str(folder / "tokenizer.json"),
        chunk_size=CHUNK_SIZE,
        train=TRAIN,
        test=TEST,
        style="pairs",
    )
    return make_facts_job.run(config)


@pytest.fixture(scope="module")
def datasets(folder, corpus):
    """(training, held-out); what is known about places of one is not in the other."""
    with open(corpus["output_url"]) as file:
        lines = list(file)
    assert [json.loads(line)["split"] for line in lines[2 * TRAIN :: 2]] == ["retrieval"] * TEST
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    known = prepare(folder / "known", lines[: 2 * TRAIN], tokenizer, "train")
    asked = prepare(folder / "asked", lines[2 * TRAIN :], tokenizer, "test")
    known_map, asked_map = statement_map(folder, *known), searched_map(folder / "index", *asked)
    return Data(*known, known_map), Data(*asked, asked_map)


@pytest.fixture(scope="module")
def runs(folder, datasets):
    """Folders of the plain decoder and of the model with retrieval fitted to it."""
    training, outputs = datasets[0], (folder / "plain", folder / "fitted")
    first = plain(**CHANGES, trainer__max_steps=250)
    second = {"trainer__max_steps": 150, "trainer__copy_warmup_steps": 40, "trainable": "retrieval"}
    pretrain.run(job(training, outputs[0], **first))
    pretrain.run(job(training, outputs[1], init_url=str(outputs[0]), **CHANGES, **second))
    return [str(output) for output in outputs]


def evaluated(run_url, held_out, *conditions, **retrieval):
    config = evaluate.EvaluateConfig(
        run_url=run_url,
        dataset_url=held_out.training.url,
        conditions=conditions,
        seq_length=SEQ_LENGTH,
        stride=SEQ_LENGTH,
        neighbors=1,
        answer_pattern=ANSWER_PATTERN,
        **retrieval,
    )
    result = evaluate.run(config)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def losses(runs, datasets):
    held_out = datasets[1]
    urls = {"retrieval_url": held_out.retrieval.url, "map_url": held_out.map.url}
    return evaluated(runs[1], held_out, *CONDITIONS, **urls)


def test_job_knows_how_many_answer_tokens_are_evaluated_and_their_entropy(corpus, losses):
    said = corpus["splits"]["test"]
    assert said == {
        "places": TEST,
        "answer_tokens": TEST * len(VALUES),
        "entropy": pytest.approx(ENTROPY),
    }
    assert {losses[mode]["tokens"] for mode in CONDITIONS} == {said["answer_tokens"]}


def test_nothing_about_held_out_places_is_in_training(datasets):
    training, held_out = datasets
    asked = {row.tobytes() for row in first_chunks(held_out.training)}
    seen = [first_chunks(d) for d in (training.training, training.retrieval)]
    assert len(asked) == TEST
    assert not asked & {row.tobytes() for rows in seen for row in rows}


def test_index_finds_the_statement_of_every_place(datasets):
    held_out = datasets[1]
    rows = held_out.map.load().get(held_out.training.document_first_chunk[:-1])
    found = held_out.retrieval.get_chunk(rows[:, 0], continuation=False)
    assert (found == first_chunks(held_out.training)).all()


def test_loss_without_retrieval_is_the_known_entropy(losses):
    assert 0.99 * ENTROPY < losses["off"]["loss"] < 1.05 * ENTROPY


@pytest.mark.parametrize("condition", ["on", "oracle"])
def test_loss_with_retrieval_is_near_zero(losses, condition):
    assert losses[condition]["loss"] < 0.1 * ENTROPY


def test_random_neighbors_are_worse_than_none(losses):
    assert losses["random"]["loss"] > losses["off"]["loss"]


def test_fitting_leaves_the_decoder_as_it_was(runs, datasets, losses):
    alone = evaluated(runs[0], datasets[1], "off")
    assert alone["off"]["loss"] == pytest.approx(losses["off"]["loss"], rel=1e-6)


def test_a_model_trained_from_scratch_reads_its_neighbors(folder, datasets):
    """What it learned on random tokens, it does with facts; the truth helps, random text harms."""
    training, held_out = datasets
    config = job(
        training,
        folder / "scratch",
        **CHANGES,
        retrieval_start="copying",
        trainer__max_steps=300,
        trainer__copy_warmup_steps=100,
        trainer__copy_warmup_tokens="random",
        optim__retrieval_lr_ratio=0.05,
    )
    pretrain.run(config)
    urls = {"retrieval_url": held_out.retrieval.url, "map_url": held_out.map.url}
    found = evaluated(config.output_url, held_out, *CONDITIONS, **urls)
    assert found["on"]["loss"] < 0.1 * ENTROPY
    assert found["on"]["loss"] < found["oracle"]["loss"] < 0.75 * found["off"]["loss"]
    assert found["random"]["loss"] > found["off"]["loss"]
