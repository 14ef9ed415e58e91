"""Checkpoints of sharded training on any fsspec URL (torch.distributed.checkpoint), readable at any
world size.

Each is written to a folder of its own and announced by a create-only record `step-NNNNNNNN.json`
when it is complete; a killed writer leaves a folder that no record names. The record holds

    folder, files                     where, and the size of every file
    config, width_scales              of the model
    run, fingerprints                 the resolved configuration; of tokenizer, datasets and maps
    progress                          step, samples consumed, tokens and what else the loop counts

The state of random numbers is no part of it: they follow from seed, step and rank. No pickle is
run: tensors are loaded with weights_only, and the list of them by a reader that knows a few
harmless classes only.
"""

import pickle
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from etl.deadline import RemoteError
from etl.manifest import DatasetManifest
from etl.storage import StorageError, create_json, filesystem_of, join_url, read_json
from indexing.joined_manifest import JoinedManifest
from model.config import ConfigError, RetroConfig
from model.retro import Retro, is_retrieval_parameter

_FOLDER = "checkpoints"
_TRAINING_ONLY = {"init_method_std", "hidden_dropout", "attention_dropout"}


class CheckpointError(RemoteError):
    """A checkpoint could not be written; those before it are whole."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved and which are kept.

    Attributes:
        interval: Steps between checkpoints; there is always one at the end.
        keep_last: So many of the newest are kept.
        keep_every: Those of every so many steps are kept as well.
        asynchronous: Training goes on, from a copy in host memory, while a checkpoint is written.
    """

    interval: int = 200
    keep_last: int = 2
    keep_every: int | None = None
    asynchronous: bool = False

    def __post_init__(self) -> None:
        if min(self.interval, self.keep_last, self.keep_every or 1) < 1:
            raise ConfigError(f"{self}: expected numbers of steps and checkpoints from 1 up")


class Checkpointer:
    """Saves and restores a run's weights and optimizer state, on all ranks together.

    Args:
        about: What every record of the run says besides folder, files, config and progress.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        run_url: str,
        model: Retro,
        optimizer: torch.optim.Optimizer,
        about: dict[str, Any],
    ) -> None:
        self.config, self.run_url, self.about = config, run_url, about
        self.model, self.optimizer = model, optimizer
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._pending: tuple[Future[Any], int, dict[str, Any]] | None = None
        self._saved_step: int | None = None

    def restore(self) -> dict[str, Any] | None:
        """Loads the newest checkpoint of the run in place; its progress, or None if there is none.
        What killed writers left is removed.

        Raises:
            StorageError: a file of it is missing or has another size than recorded.
        """
        record = latest_checkpoint(self.run_url)
        if dist.get_rank() == 0:
            _remove_old(self.run_url, self.config)
        if record is None:
            return None
        load(self._state(), storage_reader=_open(record), process_group=self._group)
        self._saved_step = record["progress"]["step"]
        return record["progress"]

    def save(self, step: int, progress: dict[str, Any]) -> None:
        """Saves, or (asynchronous) copies the state and starts to; nothing if this step is saved.

        Raises:
            CheckpointError: this or the checkpoint before it could not be written.
        """
        if step == self._saved_step:
            return
        self.wait()
        names = [f"step-{step:08d}-{uuid.uuid4().hex[:8]}"]
        dist.broadcast_object_list(names, group=self._group)
        folder = _absolute(join_url(self.run_url, _FOLDER, names[0]))
        record = {"folder": names[0], "progress": progress}
        writer = _Writer(folder)
        with self._explained(step):
            if self.config.asynchronous:
                # The writer copies the state before it returns.
                future = async_save(self._state(), storage_writer=writer, process_group=self._group)
                self._pending = cast(Future[Any], future), step, record
            else:
                save(self._state(), storage_writer=writer, process_group=self._group)
                self._publish(step, record)
        self._saved_step = step

    def poll(self) -> None:
        """Announces a checkpoint that has been written meanwhile. Not collective.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._pending is not None and self._pending[0].done():
            future, step, record = self._pending
            self._pending = None
            with self._explained(step):
                future.result()
                self._publish(step, record)

    def wait(self) -> None:
        """Returns when what was saved is announced."""
        if self._pending is not None:
            with self._explained(self._pending[1]):
                self._pending[0].exception()
            self.poll()
        dist.barrier(group=self._group)

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except (CheckpointException, OSError) as error:
            cause = error
            if isinstance(error, CheckpointException):
                cause = next(iter(error.failures.values()))[0]
            before = latest_checkpoint(self.run_url)
            kept = f"that of step {before['progress']['step']} is whole" if before else "none yet"
            raise CheckpointError(
                f"{self.run_url}: the checkpoint of step {step} could not be written: "
                f"{type(cause).__name__}: {cause}. Earlier checkpoints: {kept}; see to the storage "
                "and start the same command again"
            ) from None

    def _state(self) -> dict[str, dict[str, Any]]:
        """Tensors only, those that training works on."""
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        return {"model": weights, "optimizer": optimizer_state(self.model, self.optimizer)}

    def _publish(self, step: int, record: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            sizes = _file_sizes(join_url(self.run_url, _FOLDER, record["folder"]))
            config = asdict(self.model.config)
            value = {**record, "files": sizes, "config": config, **self.about}
            create_json(join_url(self.run_url, _FOLDER, _record_name(step)), value)
            _remove_old(self.run_url, self.config)


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """The optimizer's own tensors of each trainable parameter, by name; zeros before its first
    step, as Adam would make them. Learning rates and decay follow from the configuration."""
    named = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            named[name] = state
    return named


class _Writer(FsspecWriter):
    """Says what the storage said, instead of where torch noticed it."""

    def write_data(self, *args: Any) -> Any:
        try:
            return super().write_data(*args)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


_LIST_OF_TENSORS = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32"},
}


class _Unpickler(pickle.Unpickler):
    """Of a checkpoint's list of tensors: places, sizes and dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _LIST_OF_TENSORS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a list of tensors")


class _Reader(FsspecReader):
    """Raises StorageError instead of running what a forged list of tensors asks for."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self.fs.concat_path(self.path, ".metadata")
        try:
            with self.fs.create_stream(path, "rb") as file:
                metadata = _Unpickler(file).load()
        except (pickle.UnpicklingError, EOFError) as error:
            raise StorageError(f"{path} is damaged: {error}") from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _file_sizes(url: str) -> dict[str, int]:
    """Size in bytes of every file in a checkpoint's folder."""
    filesystem, path = filesystem_of(url)
    filesystem.invalidate_cache()
    entries = cast(dict[str, Any], filesystem.find(path, detail=True))
    return {name.rpartition("/")[2]: int(entry["size"]) for name, entry in entries.items()}


def _open(record: dict[str, Any]) -> _Reader:
    """A checkpoint's files.

    Raises:
        StorageError: one is missing or of another size, or their list of tensors is damaged.
    """
    found, expected = _file_sizes(record["folder"]), record["files"]
    wrong = {
        name: (found.get(name), size) for name, size in expected.items() if found.get(name) != size
    }
    if wrong:
        raise StorageError(
            f"{record['folder']}: the checkpoint is damaged, (bytes found, expected) {wrong}; to "
            f"go on from the one before it, delete {record['folder'].rpartition('-')[0]}.json"
        )
    reader = _Reader(record["folder"])
    reader.read_metadata()
    return reader


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


def _remove_old(run_url: str, config: CheckpointConfig) -> None:
    """Deletes records that are not to be kept, then every checkpoint folder that no record
    names."""
    filesystem, path = filesystem_of(join_url(run_url, _FOLDER))
    if not filesystem.isdir(path):
        return
    records = _records(run_url)
    for name in records[: -config.keep_last]:
        if not config.keep_every or int(name[len("step-") : -len(".json")]) % config.keep_every:
            filesystem.rm_file(f"{path}/{name}")
    named = {read_json(join_url(run_url, _FOLDER, name))["folder"] for name in _records(run_url)}
    for entry in filesystem.ls(path, detail=False):
        name = entry.rstrip("/").rpartition("/")[2]
        if name.startswith("step-") and not name.endswith(".json") and name not in named:
            filesystem.rm(entry, recursive=True)


def latest_checkpoint(run_url: str) -> dict[str, Any] | None:
    """The newest record of a run, `folder` as a URL; None if there is none."""
    names = _records(run_url)
    return _read_record(run_url, names[-1]) if names else None


def _read_record(run_url: str, name: str) -> dict[str, Any]:
    record = read_json(join_url(run_url, _FOLDER, name))
    if "fingerprints" not in record:
        raise StorageError(
            f"{run_url}: the record {name} has no fingerprints; it is of an older version, which "
            "this one cannot continue"
        )
    return record | {"folder": _absolute(join_url(run_url, _FOLDER, record["folder"]))}


def _record_name(step: int) -> str:
    return f"step-{step:08d}.json"


def require_checkpoint(run_url: str, step: int | None = None) -> dict[str, Any]:
    """The record of a run's checkpoint of a step, by default the newest.

    Raises:
        FileNotFoundError: the run has none.
    """
    names = _records(run_url)
    if step is not None:
        names = [name for name in names if name == _record_name(step)]
    if not names:
        raise FileNotFoundError(
            f"{run_url}: no checkpoint{'' if step is None else f' of step {step}'}; expected the "
            "output_url of a jobs.pretrain run, and a step that it has kept"
        )
    return _read_record(run_url, names[-1])


def config_of(record: dict[str, Any]) -> RetroConfig:
    """The model of a checkpoint."""
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
    stored, reader = config_of(record), _open(record)
    _check_compatible(stored, model.config, record["folder"])
    state = {name: p.detach() for name, p in model.named_parameters()}
    if not stored.has_retrieval:
        state = {name: value for name, value in state.items() if not is_retrieval_parameter(name)}
    _load({"model": state}, reader)


def _load(state: dict[str, Any], reader: _Reader) -> None:
    """In place; in all ranks together, or in one process without any."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(state, storage_reader=reader, no_dist=not dist.is_initialized())


def load_tensors(record: dict[str, Any]) -> dict[str, Tensor]:
    """Everything in a checkpoint, weights and optimizer state, whole and by name, on the CPU."""
    reader = _open(record)
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    _load(state, reader)
    return state


def load_model(run_url: str) -> Retro:
    """The model of a run's newest checkpoint, whole, in this process, on the CPU."""
    record = require_checkpoint(run_url)
    config = config_of(record)
    model = Retro(config)
    load_weights(record, model)
    return model.eval()


def check_tokenizer(record: dict[str, Any], manifest: DatasetManifest | JoinedManifest) -> None:
    """Refuses a dataset whose token ids mean something else than those that a checkpoint was
    trained on.

    Raises:
        StorageError: with both fingerprints.
    """
    expected, found = record["fingerprints"]["tokenizer"], manifest.tokenizer_fingerprint
    if found != expected:
        raise StorageError(
            f"{record['folder']} was trained on the tokenizer {expected}, the {manifest.split} "
            f"dataset was made with {found}; prepare the text with the tokenizer of the run"
        )


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
