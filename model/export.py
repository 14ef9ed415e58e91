"""Exported models: a folder that opens without the run, its data, torch.distributed or pickle.

    model.safetensors    the parameters under their names; a tied embedding is there once
    tokenizer-HASH.*     the tokenizer, as the training dataset stores it
    config.json          what the model is and what it was made from; written last, so a folder
                         without it does not open

muP's multipliers are recorded, not folded into the weights: a folded weight is rounded anew and a
tied matrix has two factors, so the reloaded model would be another function; and fine-tuning under
muP still needs the widths' scales, for its learning rates.

It reads checkpoints and the manifest of a dataset; the job is `jobs/export_model.py`.
"""

import json
import logging
import os
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from etl.manifest import DatasetManifest, load_manifest
from etl.storage import (
    StageFolder,
    StorageError,
    StoredFile,
    content_key,
    filesystem_of,
    put_file,
    read_json,
    scratch_folder,
    sha256_of,
    write_atomically,
)
from model.checkpoint import check_tokenizer, config_of, load_weights, require_checkpoint
from model.config import ConfigError, RetroConfig
from model.mup import meta_model
from model.retro import Retro

log = logging.getLogger(__name__)

FORMAT = "retromill-model"
VERSION = 1
WEIGHTS = "model.safetensors"
NAME = "config.json"
Dtype = Literal["float32", "bfloat16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export_model(
    run_url: str,
    output_url: str,
    dtype: Dtype = "float32",
    dataset_url: str | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint of a run as a folder; does nothing if the folder holds it already.

    Args:
        step: Of the checkpoint; by default the newest.
        dtype: Of all parameters in the file; the checkpoint has float32.
        dataset_url: Where the tokenizer is; by default the first dataset that the run was trained
            on.

    Raises:
        FileNotFoundError: there is no checkpoint, or no dataset.
        StorageError: the dataset was made with another tokenizer.
        ValueError: output_url holds another export.
    """
    record = require_checkpoint(run_url, step)
    config = config_of(record)
    dataset = StageFolder(dataset_url or _first_dataset(record))
    manifest = load_manifest(dataset.url)
    check_tokenizer(record, manifest)
    wanted = _description(record, config, manifest, dtype)
    folder = StageFolder(output_url)
    written = _finished(folder, wanted)
    if written is None:
        log.info("exporting step %d of %s", wanted["step"], run_url)
        model = Retro(config)
        load_weights(record, model)
        weights = _store_weights(folder, model, _DTYPES[dtype])
        _copy_tokenizer(dataset, folder, manifest.tokenizer)
        written = _commit(folder, wanted, weights)
    return {
        "output_url": output_url,
        "parameters": sum(p.numel() for p in meta_model(config).parameters()),
        "bytes": written["weights"]["bytes"],
        "step": written["step"],
        "dtype": written["dtype"],
    }


def _first_dataset(record: dict[str, Any]) -> str:
    urls = record["run"]["data"]["train_url"]
    if urls is None:
        raise ValueError(
            f"{record['folder']}: the run was trained on joined shards, which hold no tokenizer; "
            "name a dataset that was made with it (dataset_url)"
        )
    return urls if isinstance(urls, str) else urls[0]


def _description(
    record: dict[str, Any], config: RetroConfig, manifest: DatasetManifest, dtype: Dtype
) -> dict[str, Any]:
    """All of config.json that is known before anything is written, as JSON gives it back."""
    scales = record["width_scales"]
    mup = {"output_width_mult": config.output_width_mult, "width_scales": scales}
    value = {
        "format": FORMAT,
        "version": VERSION,
        "model": asdict(config),
        "checkpoint": record["folder"].rstrip("/").rpartition("/")[2],
        "step": record["progress"]["step"],
        "tokens": record["progress"]["tokens"],
        "dtype": dtype,
        "mup": None if scales is None else mup,
        "fingerprints": record["fingerprints"],
        "tokenizer": {
            **asdict(manifest.tokenizer),
            "fingerprint": manifest.tokenizer_fingerprint,
            "eod_token": manifest.eod_token,
            "eod_id": manifest.eod_id,
            "pad_id": manifest.pad_id,
            "vocab_size": manifest.vocab_size,
        },
    }
    return json.loads(json.dumps(value))


def _finished(folder: StageFolder, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """What config.json says if the folder holds this export, whole; None if it is to be written."""
    try:
        found = exported_config(folder.url)
    except FileNotFoundError:
        return None
    _check_same(folder, found, wanted)
    try:
        for file in (_weights_file(found), _stored_file(found["tokenizer"])):
            folder.check_size(file)
    except StorageError as error:
        log.warning("exporting again: %s", error)
        filesystem, path = filesystem_of(folder.path_of(NAME))
        filesystem.rm_file(path)
        return None
    return found


def _check_same(folder: StageFolder, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = {k: (found[k], value) for k, value in wanted.items() if found[k] != value}
    if differing:
        raise ValueError(
            f"{folder.url} holds another export (found, expected): {differing}; name another "
            "output_url, or delete that folder"
        )


def _stored_file(entry: dict[str, Any]) -> StoredFile:
    return StoredFile(*(entry[field.name] for field in fields(StoredFile)))


def _weights_file(config: dict[str, Any]) -> StoredFile:
    return _stored_file(config["weights"] | {"name": WEIGHTS})


def _store_weights(folder: StageFolder, model: Retro, dtype: torch.dtype) -> StoredFile:
    """The same bytes for the same weights: the only entry of its metadata is fixed."""
    tensors = {
        name: parameter.detach().to(dtype).contiguous()
        for name, parameter in model.named_parameters()
    }
    with scratch_folder(folder.url) as scratch:
        local = scratch / WEIGHTS
        save_file(tensors, local, metadata={"format": "pt"})
        with open(local, "rb") as file:
            os.fsync(file.fileno())
        stored = StoredFile(WEIGHTS, local.stat().st_size, sha256_of(local))
        put_file(local, folder.path_of(WEIGHTS))
    return stored


def _copy_tokenizer(dataset: StageFolder, folder: StageFolder, tokenizer: StoredFile) -> None:
    data = dataset.fetch_verified(tokenizer).read_bytes()
    write_atomically(folder.path_of(tokenizer.name), lambda file: file.write(data))


def _commit(folder: StageFolder, wanted: dict[str, Any], weights: StoredFile) -> dict[str, Any]:
    """Publishes config.json, unless another export of the same got there first."""
    value = wanted | {
        "weights": {"bytes": weights.bytes, "sha256": weights.sha256},
        "retromill": _release(),
    }
    value["fingerprint"] = content_key(value)
    found = folder.publish(NAME.removesuffix(".json"), value)
    _check_same(folder, found, wanted)
    folder.remove_scratch()
    return found


def _release() -> str:
    try:
        return version("retromill")
    except PackageNotFoundError:  # a checkout that was never installed
        return "unknown"


def exported_config(url: str) -> dict[str, Any]:
    """config.json of an exported model.

    Raises:
        FileNotFoundError: the folder has none: not an export, or one that was not finished.
        StorageError: another format or version, or content that was edited.
    """
    where = StageFolder(url).path_of(NAME)
    try:
        found = read_json(where)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{where}: no such file; expected the output_url of a finished jobs.export_model"
        ) from None
    _check_config(where, found)
    return found


def _check_config(where: str, found: Any) -> None:
    known = (found.get("format"), found.get("version")) if isinstance(found, dict) else found
    if known != (FORMAT, VERSION):
        raise StorageError(
            f"{where}: format and version are {known}, this code reads {(FORMAT, VERSION)}"
        )
    expected = content_key({k: v for k, v in found.items() if k != "fingerprint"})
    if found.get("fingerprint") != expected:
        raise StorageError(
            f"{where}: fingerprint {found.get('fingerprint')}, its content has {expected}; it was "
            "edited: export the model again"
        )


def load_exported(url: str) -> Retro:
    """The exported model on the CPU, in evaluation mode, its parameters of the exported dtype.

    Raises:
        FileNotFoundError: `url` is not the folder of a finished export.
        StorageError: the folder is damaged, or holds a model that this code does not know.
    """
    config = exported_config(url)
    model = meta_model(_known_config(url, config["model"]))
    folder, file = StageFolder(url), _weights_file(config)
    folder.check_size(file)
    try:
        tensors = load_file(folder.fetch_verified(file))
    except SafetensorError as error:
        raise StorageError(f"{folder.path_of(WEIGHTS)}: no safetensors file: {error}") from None
    model.to(_DTYPES[config["dtype"]])
    _check_tensors(folder.path_of(WEIGHTS), tensors, model)
    # Copied: `tensors` are a map of the file, and who writes to it would change the model.
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    return model.eval()


def _known_config(url: str, values: dict[str, Any]) -> RetroConfig:
    names = {field.name for field in fields(RetroConfig)}
    if values.keys() != names:
        raise StorageError(
            f"{url}: the model has settings {sorted(values.keys() - names)} that this code does "
            f"not know, and lacks {sorted(names - values.keys())}; export it again from its run"
        )
    try:
        return config_of({"config": values})
    except ConfigError as error:
        raise StorageError(f"{url}: {error}") from None


def _check_tensors(where: str, tensors: dict[str, Tensor], model: Retro) -> None:
    found = {name: (list(t.shape), t.dtype) for name, t in tensors.items()}
    expected = {name: (list(p.shape), p.dtype) for name, p in model.named_parameters()}
    if found != expected:
        names = sorted(name for name in found | expected if found.get(name) != expected.get(name))
        shown = {name: (found.get(name), expected.get(name)) for name in names[:5]}
        raise StorageError(
            f"{where}: {len(names)} tensors are not those of the model in {NAME} (found, "
            f"expected): {shown}; export the model again"
        )
