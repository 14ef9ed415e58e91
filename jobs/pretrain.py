"""train | `torchrun --nproc_per_node N -m jobs.pretrain` | torch FSDP2 |
reads datasets and KNN maps | writes checkpoints, metrics.jsonl, TensorBoard events.
"""

import json
import logging
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from etl.dataset import Dataset
from etl.storage import StorageError, create_json, join_url, read_json
from indexing.knn_manifest import open_map
from jobs import STARTED_BY
from jobs.command_line import run_job
from model import flops
from model.checkpoint import freeze_decoder, latest_checkpoint, load_weights, require_checkpoint
from model.config import ModelConfig, RetroConfig
from model.initialization import initialize, start_retrieval_from_decoder
from model.mup import BaseShapes, WidthScales, read_shape_file, width_scales, with_mup
from model.optimizer import OptimConfig, build_optimizer, check_name
from model.parallel import Precision, end_with, process_group, shard
from model.retro import Retro, is_retrieval_parameter
from model.samples import NeighborReader, SampleReader
from model.trainer import Trainer, TrainerConfig, describe

log = logging.getLogger(__name__)
_CONFIG = "run.json"


@dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
        train_url: Folder of the training dataset.
        validation_url: Folder of the validation dataset; none: no validation.
        retrieval_url: Folder of the retrieval dataset; for a model with chunked cross-attention.
        train_map_url: Folder of the training dataset's KNN map.
        validation_map_url: Folder of the validation dataset's KNN map.
        seq_length: Tokens of a sample, a multiple of chunk_size.
        neighbors: Neighbors of each chunk.
    """

    train_url: str
    validation_url: str | None = None
    retrieval_url: str | None = None
    train_map_url: str | None = None
    validation_map_url: str | None = None
    seq_length: int = 2048
    neighbors: int = 2


@dataclass(frozen=True)
class PretrainConfig:
    """Trains RETRO, or its plain decoder, from scratch or from a checkpoint.

    Attributes:
        output_url: Folder of this run; started again with the same configuration, it continues.
        data: Datasets and maps.
        model: Shape of the model; empty dec_cross_attention is a plain decoder.
        trainer: The loop.
        optim: Optimizer and schedule.
        init_url: Folder of a run whose newest weights to start from. A plain decoder may become a
            RETRO model.
        shape_file: URL of a muP shape file that jobs.mup_shapes wrote: initial weights, learning
            rates and logits are scaled by the width over that of its base model; goes with
            optim.name muadamw or muadam.
        trainable: all parameters, or only those of retrieval, on a frozen decoder (RETRO-fitting;
            needs init_url).
        precision: 32, or bf16 for parameters and arithmetic with float32 master weights.
        device: cpu (gloo) or cuda (nccl).
        dry_run: Check the inputs, print the plan with sizes and write nothing.
    """

    output_url: str
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    init_url: str | None = None
    shape_file: str | None = None
    trainable: Literal["all", "retrieval"] = "all"
    precision: Precision = "32"
    device: Literal["cpu", "cuda"] = "cpu"
    dry_run: bool = False


def run(config: PretrainConfig) -> dict[str, Any] | None:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(STARTED_BY)
    train, validation = _readers(config)
    shapes = read_shape_file(config.shape_file) if config.shape_file else None
    model = Retro(_model_config(config, train.dataset, shapes))
    scales = width_scales(model, shapes) if shapes else None
    check_name(config.optim, scales)
    if config.trainable == "retrieval" and not (model.config.has_retrieval and config.init_url):
        raise ValueError(
            "trainable=retrieval needs init_url (the decoder to freeze) and a model with "
            "dec_cross_attention"
        )
    if config.dry_run:
        return _describe(config, model, train)
    with process_group(config.device) as mesh:
        logging.getLogger().setLevel(logging.INFO if mesh.get_rank() == 0 else logging.WARNING)
        _claim_folder(config, shapes, train)
        log.info("%s", flops.describe(model.config, train.seq_length, train.neighbors))
        _prepare_weights(config, model, scales)
        model.to(config.device)
        shard(model, mesh, config.precision)
        optimizer = build_optimizer(config.optim, model, scales)
        loop, url = config.trainer, config.output_url
        trainer = Trainer(loop, config.optim, optimizer, model, mesh, train, validation, url)
        result = trainer.run()
        return {"run_url": config.output_url, **result} if mesh.get_rank() == 0 else None


def _readers(config: PretrainConfig) -> tuple[SampleReader, SampleReader | None]:
    """Readers of training and validation samples, after every manifest was checked against the
    others."""
    data = config.data
    needs_retrieval = bool(config.model.dec_cross_attention)
    named = {
        k: v
        for k, v in asdict(data).items()
        if k in ("retrieval_url", "train_map_url", "validation_map_url") and v
    }
    if needs_retrieval and not (data.retrieval_url and data.train_map_url):
        raise ValueError(
            "a model with dec_cross_attention needs data.retrieval_url and data.train_map_url"
        )
    if not needs_retrieval and named:
        raise ValueError(
            f"{sorted(named)} have no effect on a plain decoder (dec_cross_attention is empty); "
            "leave them out"
        )
    retrieval = Dataset(data.retrieval_url) if data.retrieval_url else None
    train = _reader(config, data.train_url, data.train_map_url, retrieval)
    if train.dataset.manifest.split != "train":
        raise ValueError(
            f"{data.train_url} is the {train.dataset.manifest.split} dataset; training on it would "
            "be a leak"
        )
    if data.validation_url is None:
        return train, None
    if needs_retrieval and data.validation_map_url is None:
        raise ValueError("validation with retrieval needs data.validation_map_url")
    validation = _reader(config, data.validation_url, data.validation_map_url, retrieval)
    if (
        validation.dataset.manifest.tokenizer_fingerprint
        != train.dataset.manifest.tokenizer_fingerprint
    ):
        raise StorageError(
            f"{data.validation_url} and {data.train_url} were made with different tokenizers"
        )
    return train, validation


def _reader(
    config: PretrainConfig, url: str, map_url: str | None, retrieval: Dataset | None
) -> SampleReader:
    dataset = Dataset(url)
    neighbors = None
    if retrieval is not None and map_url is not None:
        neighbors = NeighborReader.open(
            dataset, open_map(map_url), retrieval, config.data.neighbors
        )
    return SampleReader(dataset, config.data.seq_length, neighbors)


def _model_config(
    config: PretrainConfig, dataset: Dataset, shapes: BaseShapes | None
) -> RetroConfig:
    manifest = dataset.manifest
    standard = RetroConfig(
        **asdict(config.model),
        vocab_size=manifest.vocab_size,
        eod_id=manifest.eod_id,
        chunk_size=manifest.chunk_size,
    )
    return standard if shapes is None else with_mup(standard, shapes)


def _claim_folder(config: PretrainConfig, shapes: BaseShapes | None, train: SampleReader) -> None:
    """Records what determines the run; refuses a folder that holds a run of another
    configuration."""
    wanted = {
        "model": asdict(config.model),
        "trainer": describe(config.trainer, config.optim),
        "seq_length": config.data.seq_length,
        "neighbors": train.neighbors or None,
        "trainable": config.trainable,
        "precision": config.precision,
        "base_shapes": shapes,
        "training_fingerprint": train.dataset.manifest.fingerprint,
        "map_fingerprint": open_map(config.data.train_map_url).fingerprint
        if config.data.train_map_url
        else None,
        "init": require_checkpoint(config.init_url)["progress"] if config.init_url else None,
    }
    wanted = json.loads(json.dumps(wanted))
    url = join_url(config.output_url, _CONFIG)
    create_json(url, wanted)
    found = read_json(url)
    differing = {
        key: (found.get(key), wanted[key]) for key in wanted if found.get(key) != wanted[key]
    }
    if differing:
        raise ValueError(
            f"{config.output_url} holds a run of another configuration (found, wanted): "
            f"{differing}; name another "
            "output_url, or the old configuration to continue it"
        )


def _prepare_weights(config: PretrainConfig, model: Retro, scales: WidthScales | None) -> None:
    """Initial or loaded weights, before sharding; a run that continues overwrites them from its
    checkpoint."""
    initialize(model, config.trainer.seed, scales)
    if config.init_url is not None and latest_checkpoint(config.output_url) is None:
        load_weights(require_checkpoint(config.init_url), model)
        if config.trainable == "retrieval":
            start_retrieval_from_decoder(model)
    if config.trainable == "retrieval":
        freeze_decoder(model)


def _describe(config: PretrainConfig, model: Retro, train: SampleReader) -> dict[str, Any]:
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    flops_per_sample = flops.training_flops(model.config, train.seq_length, train.neighbors)
    return {
        "run_url": config.output_url,
        "parameters": sum(sizes.values()),
        "retrieval_parameters": sum(
            size for name, size in sizes.items() if is_retrieval_parameter(name)
        ),
        "training_samples": train.num_samples,
        "tokens_per_step": config.trainer.global_batch_size * config.data.seq_length,
        "tokens": config.trainer.max_steps
        * config.trainer.global_batch_size
        * config.data.seq_length,
        "training_flops_per_token": flops_per_sample / train.seq_length,
    }


if __name__ == "__main__":
    run_job("Train RETRO or its plain decoder with FSDP2.", PretrainConfig, run)
