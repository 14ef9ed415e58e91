"""Checkpoints of sharded training on any fsspec URL (torch.distributed.checkpoint), readable at any
world size.

Each is written to a folder of its own and announced by a create-only record `step-NNNNNNNN.json`
when it is complete; a killed writer leaves a folder that no record names.
"""

import uuid
import warnings
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from etl.storage import StorageError, create_json, filesystem_of, join_url, read_json
from model.config import RetroConfig
from model.retro import Retro, is_retrieval_parameter

_FOLDER = "checkpoints"
_TRAINING_ONLY = {"init_method_std", "hidden_dropout", "attention_dropout"}


def save_checkpoint(
    run_url: str,
    step: int,
    model: Retro,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    keep: int,
) -> None:
    """Saves on all ranks; then rank 0 publishes the record and deletes all but the `keep` newest
    checkpoints."""
    names = [f"step-{step:08d}-{uuid.uuid4().hex[:8]}"]
    dist.broadcast_object_list(names)
    folder = _absolute(join_url(run_url, _FOLDER, names[0]))
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    save(state, storage_writer=FsspecWriter(folder))
    if dist.get_rank() == 0:
        record = {"folder": names[0], "config": asdict(model.config), "progress": progress}
        create_json(join_url(run_url, _FOLDER, f"step-{step:08d}.json"), record)
        _remove_old(run_url, keep)
    dist.barrier()


def _absolute(url: str) -> str:
    filesystem, path = filesystem_of(url)
    return filesystem.unstrip_protocol(path)


def _records(run_url: str) -> list[str]:
    """Names of the checkpoint records, oldest first."""
    filesystem, path = filesystem_of(join_url(run_url, _FOLDER))
    filesystem.invalidate_cache()
    if not filesystem.isdir(path):
        return []
    names = [entry.rstrip("/").rpartition("/")[2] for entry in filesystem.ls(path, detail=False)]
    return sorted(name for name in names if name.startswith("step-") and name.endswith(".json"))


def _remove_old(run_url: str, keep: int) -> None:
    """Deletes records beyond the newest, then every checkpoint folder that no record names."""
    filesystem, path = filesystem_of(join_url(run_url, _FOLDER))
    records = _records(run_url)
    for name in records[:-keep]:
        filesystem.rm_file(f"{path}/{name}")
    named = {read_json(join_url(run_url, _FOLDER, name))["folder"] for name in records[-keep:]}
    for entry in filesystem.ls(path, detail=False):
        name = entry.rstrip("/").rpartition("/")[2]
        if name.startswith("step-") and not name.endswith(".json") and name not in named:
            filesystem.rm(entry, recursive=True)


def latest_checkpoint(run_url: str) -> dict[str, Any] | None:
    """The newest record of a run: `folder` (a URL), `config`, `progress`; None if there is none."""
    records = _records(run_url)
    if not records:
        return None
    record = read_json(join_url(run_url, _FOLDER, records[-1]))
    return record | {"folder": _absolute(join_url(run_url, _FOLDER, record["folder"]))}


def require_checkpoint(run_url: str) -> dict[str, Any]:
    """The newest record of a run.

    Raises:
        FileNotFoundError: the run has no checkpoint.
    """
    record = latest_checkpoint(run_url)
    if record is None:
        raise FileNotFoundError(
            f"{run_url}: no checkpoint; expected the output_url of a jobs.pretrain run"
        )
    return record


def resume(
    record: dict[str, Any], model: Retro, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Loads weights and optimizer state in place; returns the progress."""
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    load(state, storage_reader=FsspecReader(record["folder"]))
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return record["progress"]


def _config_of(record: dict[str, Any]) -> RetroConfig:
    stored: dict[str, Any] = record["config"]
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    return RetroConfig(**values)


def load_weights(record: dict[str, Any], model: Retro) -> None:
    """Loads the weights in place, into a model with or without retrieval parts that the checkpoint
    lacks.

    Raises:
        StorageError: the checkpoint lacks other parameters, or was made for another shape,
            vocabulary or chunk size.
    """
    stored = _config_of(record)
    _check_compatible(stored, model.config, record["folder"])
    state = get_model_state_dict(model)
    if not stored.has_retrieval:
        state = {name: value for name, value in state.items() if not is_retrieval_parameter(name)}
    alone = not dist.is_initialized()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load({"model": state}, storage_reader=FsspecReader(record["folder"]), no_dist=alone)


def load_model(run_url: str) -> Retro:
    """The model of a run's newest checkpoint, whole, in this process, on the CPU."""
    record = require_checkpoint(run_url)
    config = _config_of(record)
    model = Retro(config)
    load_weights(record, model)
    return model.eval()


def _check_compatible(stored: RetroConfig, wanted: RetroConfig, folder: str) -> None:
    free = {
        "dec_cross_attention",
        "enc_num_layers",
        "enc_width_ratio",
        "cross_attention_gate",
        "enc_cross_attention",
        "version",
        "reset_cross_attention",
    }
    if stored.has_retrieval:
        free = set()
    found, expected = asdict(stored), asdict(wanted)
    differing = {
        k: (found[k], expected[k])
        for k in found
        if k not in free | _TRAINING_ONLY and found[k] != expected[k]
    }
    if differing:
        raise StorageError(
            f"{folder}: the checkpoint differs from the configured model (found, expected): "
            f"{differing}"
        )


def freeze_decoder(model: nn.Module) -> None:
    """Only the retrieval parts stay trainable; call it before sharding."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_retrieval_parameter(name))
