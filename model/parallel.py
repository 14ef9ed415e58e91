"""Parallelism applied from outside: FSDP2 over any number of ranks, on CPU (gloo) or CUDA
(nccl)."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from model.retro import Retro

Precision = Literal["32", "bf16"]


@contextmanager
def process_group(device: str) -> Iterator[DeviceMesh]:
    """The mesh over all ranks that torchrun started; a single process without torchrun is a mesh of
    one."""
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
    ):
        os.environ.setdefault(name, value)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield init_device_mesh(device, (dist.get_world_size(),))
    finally:
        dist.destroy_process_group()


def end_with(parent: int) -> None:
    """Ends this process, from a thread, when its parent is not (or no longer) `parent`.

    torchrun starts ranks in sessions of their own, so they would outlive a launcher that was killed
    and write beside its successor.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def shard(model: Retro, mesh: DeviceMesh, precision: Precision) -> None:
    """Shards the initialised model in place: a group for each layer, one for embedding, head and
    final norms.

    The split layer's halves are groups of their own, because the model calls them one by one.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy if precision == "bf16" else MixedPrecisionPolicy(),
    }
    for i, layer in enumerate(model.decoder_layers):
        if i == model.config.split_layer:
            fully_shard(layer.attention_half, **options)
            fully_shard(layer.feed_forward_half, **options)
        else:
            fully_shard(layer, **options)
    if model.encoder is not None:
        for layer in model.encoder.layers:
            fully_shard(layer, **options)
    fully_shard(model, **options)


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks (in place)."""
    dist.all_reduce(value)
    return value
