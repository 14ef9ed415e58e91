"""train | `torchrun --nproc_per_node N -m jobs.pretrain` | torch FSDP2 |
reads datasets and KNN maps | writes checkpoints, metrics.jsonl, TensorBoard events.
"""

import json
import logging
import os
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch.distributed.device_mesh import DeviceMesh

from etl.manifest import DatasetManifest
from etl.storage import create_json, join_url, read_json
from indexing.joined_manifest import JoinedManifest
from jobs import STARTED_BY
from jobs.command_line import run_job
from model import flops
from model.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    check_tokenizer,
    freeze_decoder,
    latest_checkpoint,
    load_weights,
    require_checkpoint,
)
from model.config import ModelConfig, RetroConfig
from model.initialization import initialize
from model.metrics import MetricsConfig
from model.mup import BaseShapes, WidthScales, read_shape_file, width_scales, with_mup
from model.optimizer import OptimConfig, build_optimizer, check_name
from model.parallel import ParallelConfig, end_with, parallelize, process_group
from model.retrieval_start import start_copying, start_retrieval_from_decoder
from model.retro import Retro, is_retrieval_parameter
from model.throughput import Throughput, peak_flops
from model.trainer import Trainer, TrainerConfig, describe
from model.training_data import DataConfig, TrainingData, open_data

log = logging.getLogger(__name__)
_CONFIG = "run.json"


@dataclass(frozen=True)
class PretrainConfig:
    """Trains RETRO, or its plain decoder, from scratch or from a checkpoint.

    Attributes:
        output_url: Folder of this run; started again with the same configuration, it continues.
        data: Datasets and maps.
        model: Shape of the model; empty dec_cross_attention is a plain decoder.
        trainer: The loop.
        optim: Optimizer and schedule.
        parallel: How the model is spread over ranks.
        checkpoint: When checkpoints are saved and kept.
        metrics: Where metrics go.
        init_url: Folder of a run whose newest weights to start from. A plain decoder may become a
            RETRO model.
        shape_file: URL of a muP shape file that jobs.mup_shapes wrote: initial weights, learning
            rates and logits are scaled by the width over that of its base model; goes with
            optim.name muadamw or muadam.
        retrieval_start: Initial weights of a model that is trained from scratch: normal, as NeMo's,
            or copying: what followed the current token in a neighbor is copied from the first step
            on, and layers write nothing yet. The latter alone on a plain decoder, to compare with.
        trainable: all parameters, or only those of retrieval, on a frozen decoder (RETRO-fitting;
            needs init_url).
        device: cpu (gloo) or cuda (nccl).
        dry_run: Check the inputs, print the plan with sizes and write nothing.
    """

    output_url: str
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    init_url: str | None = None
    shape_file: str | None = None
    retrieval_start: Literal["normal", "copying"] = "normal"
    trainable: Literal["all", "retrieval"] = "all"
    device: Literal["cpu", "cuda"] = "cpu"
    dry_run: bool = False


def run(config: PretrainConfig) -> dict[str, Any] | None:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(STARTED_BY)
    data = open_data(config.data, bool(config.model.dec_cross_attention), config.trainer.seed)
    shapes = read_shape_file(config.shape_file) if config.shape_file else None
    model = Retro(model_config(config, data.about, shapes))
    scales = width_scales(model, shapes) if shapes else None
    check_name(config.optim, scales)
    if config.trainable == "retrieval" and not (model.config.has_retrieval and config.init_url):
        raise ValueError(
            "trainable=retrieval needs init_url (the decoder to freeze) and a model with "
            "dec_cross_attention"
        )
    if config.trainer.retrieval_off_share and config.trainable == "retrieval":
        raise ValueError(
            "trainer.retrieval_off_share has nothing to train in a frozen decoder; leave it out, "
            "or set trainable=all"
        )
    if config.retrieval_start == "copying" and config.init_url:
        raise ValueError(
            "retrieval_start=copying is for a model that is trained from scratch; leave out "
            "init_url, or retrieval_start"
        )
    if config.dry_run:
        return _describe(config, model, data)
    with process_group(config.device, config.parallel.replicas) as mesh:
        logging.getLogger().setLevel(logging.INFO if mesh.get_rank() == 0 else logging.WARNING)
        _claim_folder(config, shapes, data)
        data.open_all()
        _prepare_weights(config, model, scales, data.about)
        model.to(config.device)
        parallelize(model, mesh, config.parallel)
        result = trainer_of(config, model, mesh, data, scales).run(config.metrics)
        return {"run_url": config.output_url, **result} if mesh.get_rank() == 0 else None


def trainer_of(
    config: PretrainConfig,
    model: Retro,
    mesh: DeviceMesh,
    data: TrainingData,
    scales: WidthScales | None,
) -> Trainer:
    """Of a model that is initialised and sharded."""
    optimizer = build_optimizer(config.optim, model, scales)
    about = {
        "run": asdict(config),
        "fingerprints": data.fingerprints,
        "width_scales": {n: astuple(s) for n, s in scales.items()} if scales else None,
    }
    checkpointer = Checkpointer(config.checkpoint, config.output_url, model, optimizer, about)
    length, neighbors = data.train.seq_length, data.train.neighbors
    log.info("%s", flops.describe(model.config, length, neighbors))
    per_sample = None
    if config.trainable == "all":
        of_sample = partial(flops.training_flops, model.config, length)
        per_sample = of_sample(neighbors), of_sample(0)
    device = torch.cuda.get_device_name() if config.device == "cuda" else "cpu"
    peak = peak_flops(device, config.parallel.precision)
    throughput = Throughput(mesh.size(), config.device, per_sample, peak)
    loop, optim = config.trainer, config.optim
    return Trainer(loop, optim, model, optimizer, mesh, data, checkpointer, throughput)


def model_config(
    config: PretrainConfig, manifest: DatasetManifest | JoinedManifest, shapes: BaseShapes | None
) -> RetroConfig:
    """The configured shape, with what the dataset and a muP shape file say."""
    standard = RetroConfig(
        **asdict(config.model),
        vocab_size=manifest.vocab_size,
        eod_id=manifest.eod_id,
        chunk_size=manifest.chunk_size,
    )
    return standard if shapes is None else with_mup(standard, shapes)


def _claim_folder(config: PretrainConfig, shapes: BaseShapes | None, data: TrainingData) -> None:
    """Records what determines the run; refuses a folder that holds a run of another
    configuration."""
    wanted = {
        "model": asdict(config.model),
        "trainer": describe(config.trainer, config.optim),
        "seq_length": config.data.seq_length,
        "neighbors": data.train.neighbors or None,
        "train_weights": config.data.train_weights,
        "splits_string": config.data.splits_string,
        "window_blocks": config.data.window_blocks if config.data.joined_url else None,
        "retrieval_start": config.retrieval_start,
        "trainable": config.trainable,
        "precision": config.parallel.precision,
        "base_shapes": shapes,
        "fingerprints": {k: v for k, v in data.fingerprints.items() if k != "validation"},
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


def _prepare_weights(
    config: PretrainConfig,
    model: Retro,
    scales: WidthScales | None,
    manifest: DatasetManifest | JoinedManifest,
) -> None:
    """Initial or loaded weights, before sharding; a run that continues overwrites them from its
    checkpoint."""
    initialize(model, config.trainer.seed, scales)
    if config.retrieval_start == "copying":
        start_copying(model)
    if config.init_url is not None and latest_checkpoint(config.output_url) is None:
        record = require_checkpoint(config.init_url)
        check_tokenizer(record, manifest)
        load_weights(record, model)
        if config.trainable == "retrieval":
            start_retrieval_from_decoder(model)
    if config.trainable == "retrieval":
        freeze_decoder(model)


def _describe(config: PretrainConfig, model: Retro, data: TrainingData) -> dict[str, Any]:
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    train, samples = data.train, config.trainer.global_batch_size
    flops_per_sample = flops.training_flops(model.config, train.seq_length, train.neighbors)
    return {
        "run_url": config.output_url,
        "parameters": sum(sizes.values()),
        "retrieval_parameters": sum(
            size for name, size in sizes.items() if is_retrieval_parameter(name)
        ),
        "training_samples": train.num_samples,
        "tokens_per_step": samples * train.seq_length,
        "tokens": config.trainer.max_steps * samples * train.seq_length,
        "training_flops_per_token": flops_per_sample / train.seq_length,
        "fingerprints": data.fingerprints,
    }


if __name__ == "__main__":
    run_job("Train RETRO or its plain decoder with FSDP2.", PretrainConfig, run)
