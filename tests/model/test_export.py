"""Exported models: the checkpoint's function again, and folders that are refused."""

import json
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from etl import cache
from etl.manifest import load_manifest
from etl.storage import (
    StorageError,
    content_key,
    filesystem_of,
    join_url,
    read_bytes,
    read_json,
    sha256_of,
    write_json,
)
from etl.tokenizer import load_tokenizer
from model import export
from model.checkpoint import CheckpointConfig, Checkpointer, load_model
from model.config import ModelConfig, RetroConfig
from model.export import NAME, WEIGHTS, export_model, exported_config, load_exported
from model.initialization import initialize
from model.mup import base_shapes, meta_model, width_scales, with_mup
from model.retro import Retro
from tests.model.test_families import MODERN
from tests.s3_server import s3_server

SHAPE = ModelConfig(
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=2,
    dec_num_layers=3,
    dec_cross_attention=(1,),
    enc_num_layers=1,
    enc_cross_attention=(0,),
    init_method_std=0.3,
)
UNTIED = {"share_embeddings_and_output_weights": False}
FAMILIES = {
    "nemo": {},
    "untied": UNTIED,
    "modern under muP": {**MODERN, "cross_attention_gate": True},
    "modern, tied, under muP": {**MODERN, "share_embeddings_and_output_weights": True},
}
STEP, TOKENS = 3, 768


@contextmanager
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def described(manifest, **changes):
    """The model's configuration, and its shape file if it is under muP."""
    known = {name: getattr(manifest, name) for name in ("vocab_size", "eod_id", "chunk_size")}
    config = RetroConfig(**asdict(SHAPE) | known | changes)
    if "normalization" not in changes:
        return config, None
    base, delta = (
        replace(config, hidden_size=w, ffn_hidden_size=2 * w, kv_channels=w // 4) for w in (16, 8)
    )
    shapes = base_shapes(base, delta)
    return with_mup(config, shapes), shapes


def saved_run(run_url, data, seed=0, **changes):
    """A run with one checkpoint; no biases, gates or norms at their initial values."""
    config, shapes = described(data.training.manifest, **changes)
    scales = None if shapes is None else width_scales(meta_model(config), shapes)
    model = Retro(config)
    initialize(model, seed, scales)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    about = {
        "fingerprints": {
            "tokenizer": data.training.manifest.tokenizer_fingerprint,
            "train": [data.training.manifest.fingerprint],
        },
        "width_scales": scales and {k: [s.ninf, s.width_mult] for k, s in scales.items()},
        "run": {"data": {"train_url": [data.training.url]}},
    }
    with one_rank():
        optimizer = torch.optim.AdamW(model.parameters())
        saver = Checkpointer(CheckpointConfig(), str(run_url), model, optimizer, about)
        saver.save(STEP, {"step": STEP, "samples": 12, "tokens": TOKENS})
    return str(run_url)


@pytest.fixture(scope="module")
def run_url(data, tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("run"), data)


@pytest.fixture
def exported(run_url, tmp_path):
    export_model(run_url, str(tmp_path / "exported"))
    return tmp_path / "exported"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))


def logits(model, retrieval):
    """Of two samples of two documents each."""
    m, generator = model.config.chunk_size, torch.Generator().manual_seed(1)
    tokens = torch.randint(2, model.config.vocab_size, (2, 3 * m + 5), generator=generator)
    tokens[:, m + 3] = model.config.eod_id
    neighbors = torch.randint(2, model.config.vocab_size, (2, 3, 2, 2 * m), generator=generator)
    mask = torch.ones_like(neighbors, dtype=torch.bool)
    given = (neighbors, mask) if retrieval else ()
    with torch.no_grad():
        return model(tokens, torch.ones_like(tokens, dtype=torch.bool), *given)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_model_is_the_checkpoint_bit_for_bit(data, tmp_path, family):
    run_url = saved_run(tmp_path / "run", data, **FAMILIES[family])
    result = export_model(run_url, str(tmp_path / "exported"))
    expected, found = load_model(run_url), load_exported(str(tmp_path / "exported"))
    assert found.config == expected.config
    assert (found.config.output_width_mult is None) == ("muP" not in family)
    assert not found.training
    for retrieval in (True, False):
        assert torch.equal(logits(found, retrieval), logits(expected, retrieval))
    assert not torch.equal(logits(found, True), logits(found, False))
    weights = dict(expected.named_parameters())
    stored = load_file(tmp_path / "exported" / WEIGHTS)
    assert stored.keys() == weights.keys()
    assert ("head.weight" in stored) == ("untied" in family or family == "modern under muP")
    assert result == {
        "output_url": str(tmp_path / "exported"),
        "parameters": sum(p.numel() for p in weights.values()),
        "bytes": (tmp_path / "exported" / WEIGHTS).stat().st_size,
        "step": STEP,
        "dtype": "float32",
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_export_is_the_model_cast_to_bfloat16(data, tmp_path, family):
    run_url = saved_run(tmp_path / "run", data, **FAMILIES[family])
    result = export_model(run_url, str(tmp_path / "exported"), "bfloat16")
    expected = load_model(run_url).to(torch.bfloat16)
    found = load_exported(str(tmp_path / "exported"))
    for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b), name
    for retrieval in (True, False):
        assert torch.equal(logits(found, retrieval), logits(expected, retrieval))
    assert result["dtype"] == "bfloat16"
    assert result["parameters"] * 2 < result["bytes"] < result["parameters"] * 2.2 + 10_000


def test_config_says_what_the_model_is_and_what_it_was_made_from(data, run_url, exported):
    config, manifest = exported_config(str(exported)), data.training.manifest
    assert (config["format"], config["version"]) == ("retromill-model", 1)
    assert (config["step"], config["tokens"], config["dtype"]) == (STEP, TOKENS, "float32")
    assert config["model"] == json.loads(json.dumps(asdict(load_model(run_url).config)))
    assert config["mup"] is None
    assert config["fingerprints"]["train"] == [manifest.fingerprint]
    assert config["weights"] == {
        "bytes": (exported / WEIGHTS).stat().st_size,
        "sha256": sha256_of(exported / WEIGHTS),
    }
    tokenizer = load_tokenizer(
        str(exported / config["tokenizer"]["name"]), config["tokenizer"]["eod_token"]
    )
    for name in ("fingerprint", "eod_id", "pad_id", "vocab_size"):
        assert getattr(tokenizer, name) == config["tokenizer"][name]
    files = {NAME, WEIGHTS, manifest.tokenizer.name}
    assert {path.name for path in exported.iterdir()} == files


def test_config_keeps_the_multipliers_of_muP(data, tmp_path):
    family = FAMILIES["modern under muP"]
    run_url = saved_run(tmp_path / "run", data, **family)
    export_model(run_url, str(tmp_path / "exported"))
    found = exported_config(str(tmp_path / "exported"))["mup"]
    config, shapes = described(data.training.manifest, **family)
    expected = width_scales(meta_model(config), shapes)
    assert found == {
        "output_width_mult": 2.0,
        "width_scales": {name: [s.ninf, s.width_mult] for name, s in expected.items()},
    }


def test_a_second_export_changes_nothing(run_url, exported, monkeypatch):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in exported.iterdir()}
    monkeypatch.setattr(export, "load_weights", None)
    result = export_model(run_url, str(exported))
    assert result["bytes"] == (exported / WEIGHTS).stat().st_size
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in exported.iterdir()}


def test_two_exports_are_the_same_bytes(run_url, exported, tmp_path):
    export_model(run_url, str(tmp_path / "again"))
    for path in exported.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_folder_with_another_export_is_refused(data, run_url, exported, tmp_path):
    before = (exported / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match=r"another export.*'dtype': \('float32', 'bfloat16'\)"):
        export_model(run_url, str(exported), "bfloat16")
    other = saved_run(tmp_path / "other", data, seed=1)  # same data, same step
    with pytest.raises(ValueError, match=r"another export.*'checkpoint'"):
        export_model(other, str(exported))
    assert (exported / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("stage", ["_copy_tokenizer", "_commit"])
def test_an_export_that_was_killed_does_not_open_and_is_done_again(
    run_url, tmp_path, monkeypatch, stage
):
    def killed(*_args):
        raise KeyboardInterrupt

    url = str(tmp_path / "exported")
    (tmp_path / "exported" / ".scratch-of-a-killed-job").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(export, stage, killed)
        with pytest.raises(KeyboardInterrupt):
            export_model(run_url, url)
    assert (tmp_path / "exported" / WEIGHTS).exists()
    with pytest.raises(FileNotFoundError, match=r"expected the output_url of a finished jobs"):
        load_exported(url)
    export_model(run_url, url)
    assert torch.equal(logits(load_exported(url), True), logits(load_model(run_url), True))
    assert len(list((tmp_path / "exported").iterdir())) == 3


def test_a_model_that_is_open_does_not_change_with_its_file(run_url, exported):
    model = load_exported(str(exported))
    (exported / WEIGHTS).write_bytes(bytes((exported / WEIGHTS).stat().st_size))
    assert torch.equal(logits(model, True), logits(load_model(run_url), True))


def test_a_folder_of_something_else_does_not_open(run_url, tmp_path):
    for url in (str(tmp_path), run_url, f"memory://{tmp_path.name}"):
        with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
            load_exported(url)


def damage(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[:-8])
    elif kind == "flipped":
        content[-8] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [("truncated", r"\d+ bytes, its record"), ("flipped", "sha256"), ("missing", "missing")],
)
def test_damaged_weights_are_refused_and_written_again_once_deleted(
    run_url, exported, kind, message
):
    before = (exported / WEIGHTS).read_bytes()
    damage(exported / WEIGHTS, kind)
    with pytest.raises(StorageError, match=message):
        load_exported(str(exported))
    (exported / WEIGHTS).unlink(missing_ok=True)
    export_model(run_url, str(exported))
    assert (exported / WEIGHTS).read_bytes() == before
    load_exported(str(exported))


def rewrite(exported, **changes):
    """config.json with other values and a fingerprint that fits them."""
    config = read_json(str(exported / NAME)) | changes
    config["fingerprint"] = content_key({k: v for k, v in config.items() if k != "fingerprint"})
    write_json(str(exported / NAME), config)


def rewrite_weights(exported, tensors):
    save_file(tensors, exported / WEIGHTS)
    size, digest = (exported / WEIGHTS).stat().st_size, sha256_of(exported / WEIGHTS)
    rewrite(exported, weights={"bytes": size, "sha256": digest})


def test_a_config_of_another_format_or_version_or_settings_is_refused(exported):
    whole = read_json(str(exported / NAME))
    for changes, message in (
        ({"format": "other"}, r"\('other', 1\), this code reads \('retromill-model', 1\)"),
        ({"version": 2}, r"\('retromill-model', 2\), this code reads"),
        ({"model": whole["model"] | {"magic": 1}}, r"\['magic'\] that this code"),
        ({"model": whole["model"] | {"kv_channels": 3}}, "expected an even number"),
    ):
        write_json(str(exported / NAME), whole)
        rewrite(exported, **changes)
        with pytest.raises(StorageError, match=message):
            load_exported(str(exported))
    for broken in ([], None, "x"):
        write_json(str(exported / NAME), broken)
        with pytest.raises(StorageError, match="this code reads"):
            load_exported(str(exported))


def test_a_config_that_was_edited_is_refused(exported):
    config = read_json(str(exported / NAME))
    config["model"]["rope_theta"] = 500.0
    write_json(str(exported / NAME), config)
    with pytest.raises(StorageError, match="it was edited"):
        load_exported(str(exported))


def test_tensors_that_are_not_the_model_s_are_refused(exported):
    whole = load_file(exported / WEIGHTS)
    bias = "final_layernorm.bias"
    less = {name: tensor for name, tensor in whole.items() if name != bias}
    for tensors, message in (
        (less, rf"1 tensors.*'{bias}': \(None, \(\[32\], torch.float32\)\)"),
        (whole | {"more": torch.zeros(2)}, r"1 tensors.*'more': \(\(\[2\], torch.float32\), None"),
        (whole | {bias: torch.zeros(31)}, rf"'{bias}': \(\(\[31\], "),
        (whole | {bias: torch.zeros(32).half()}, rf"'{bias}': \(\(\[32\], torch.float16"),
    ):
        rewrite_weights(exported, tensors)
        with pytest.raises(StorageError, match=message):
            load_exported(str(exported))
    (exported / WEIGHTS).write_bytes(b"no safetensors")
    digest = sha256_of(exported / WEIGHTS)
    rewrite(exported, weights={"bytes": 14, "sha256": digest})
    with pytest.raises(StorageError, match="no safetensors file"):
        load_exported(str(exported))


@pytest.fixture
def remote_run(data, tmp_path, own_cache):
    """A run, its dataset and an empty output folder, all in one remote storage."""

    def make(root):
        source, dataset_url = data.training.url, join_url(root, "data")
        for name in ("manifest.json", data.training.manifest.tokenizer.name):
            filesystem, path = filesystem_of(join_url(dataset_url, name))
            filesystem.pipe_file(path, read_bytes(join_url(source, name)))
        return saved_run(join_url(root, "run"), data), dataset_url, join_url(root, "exported")

    return make


def check_remote(run_url, dataset_url, url):
    result = export_model(run_url, url, dataset_url=dataset_url)
    assert export_model(run_url, url, dataset_url=dataset_url) == result
    assert torch.equal(logits(load_exported(url), True), logits(load_model(run_url), True))
    filesystem, path = filesystem_of(join_url(url, WEIGHTS))
    filesystem.pipe_file(path, bytes(result["bytes"]))


def test_an_export_in_memory_opens_and_a_damaged_one_does_not(remote_run, monkeypatch, tmp_path):
    run_url, dataset_url, url = remote_run(f"memory://{tmp_path.name}")
    check_remote(run_url, dataset_url, url)
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "another machine"))
    with pytest.raises(StorageError, match="sha256"):
        load_exported(url)
    filesystem, path = filesystem_of(join_url(url, WEIGHTS))
    filesystem.rm_file(path)
    with pytest.raises(StorageError, match="missing"):
        load_exported(url)


def test_an_export_on_s3_opens_and_a_damaged_one_does_not(remote_run, tmp_path):
    with pytest.MonkeyPatch.context() as patch, s3_server(patch):
        filesystem_of("s3://bucket")[0].mkdir("bucket")
        run_url, dataset_url, url = remote_run("s3://bucket/here")
        check_remote(run_url, dataset_url, url)
        patch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "another machine"))
        with pytest.raises(StorageError, match="sha256"):
            load_exported(url)


def rewrite_record(run_url, change):
    [path] = run_url.glob("checkpoints/step-*.json")
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_another_tokenizer_is_refused(data, tmp_path):
    saved_run(tmp_path / "run", data)
    rewrite_record(tmp_path / "run", lambda record: record["fingerprints"].update(tokenizer="ab12"))
    found = load_manifest(data.training.url).tokenizer_fingerprint
    with pytest.raises(StorageError, match=rf"trained on the tokenizer ab12, .*{found}"):
        export_model(str(tmp_path / "run"), str(tmp_path / "exported"))
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("is_list", [True, False])
def test_moved_data_is_found_where_it_is_named(data, tmp_path, is_list):
    saved_run(tmp_path / "run", data)
    urls = [str(tmp_path / "gone"), "second"] if is_list else str(tmp_path / "gone")
    rewrite_record(tmp_path / "run", lambda r: r["run"]["data"].update(train_url=urls))
    run_url, url = str(tmp_path / "run"), str(tmp_path / "exported")
    with pytest.raises(FileNotFoundError, match="gone/manifest"):
        export_model(run_url, url)
    assert export_model(run_url, url, dataset_url=data.training.url)["step"] == STEP


def test_a_damaged_tokenizer_is_not_exported(data, tmp_path):
    moved, name = tmp_path / "data", data.training.manifest.tokenizer.name
    moved.mkdir()
    (moved / "manifest.json").write_bytes(read_bytes(join_url(data.training.url, "manifest.json")))
    (moved / name).write_bytes(read_bytes(join_url(data.training.url, name)).swapcase())
    run_url = saved_run(tmp_path / "run", data)
    with pytest.raises(StorageError, match="sha256"):
        export_model(run_url, str(tmp_path / "exported"), dataset_url=str(moved))
    assert not (tmp_path / "exported" / NAME).exists()


def test_a_checkpoint_that_names_no_data_is_refused(data, tmp_path):
    saved_run(tmp_path / "run", data)
    rewrite_record(tmp_path / "run", lambda record: record.pop("fingerprints"))
    with pytest.raises(StorageError, match="no fingerprints"):
        export_model(str(tmp_path / "run"), str(tmp_path / "exported"))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        export_model(str(tmp_path), str(tmp_path / "exported"))
