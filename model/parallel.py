"""Parallelism applied from outside: activation checkpointing, compilation and FSDP2 over any number
of ranks, on CPU (gloo) or CUDA (nccl).

Nothing here renames a parameter: names are what checkpoints, initial weights and muP go by.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.utils.checkpoint import checkpoint

from model.config import ConfigError
from model.retro import Retro

ActivationCheckpointing = Literal["none", "encoder", "full"]


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread over ranks, and what it computes in.

    Attributes:
        replicas: Copies of the sharded model; each is sharded over world size / replicas ranks, and
            gradients are summed over the copies once a step. Take the number of nodes where the
            network between them is slow.
        precision: 32, or bf16 for parameters and arithmetic; master weights, gradients that are
            summed over ranks, and losses stay in float32.
        activation_checkpointing: Layers whose activations are computed again in the backward pass
            instead of being kept: none, those of the encoder, or all (full).
        compile: Compile each layer with torch.compile.
    """

    replicas: int = 1
    precision: Literal["32", "bf16"] = "32"
    activation_checkpointing: ActivationCheckpointing = "none"
    compile: bool = False


@contextmanager
def process_group(device: str, replicas: int) -> Iterator[DeviceMesh]:
    """The (replicate, shard) mesh over all ranks that torchrun started; a single process without
    torchrun is a mesh of one.

    Raises:
        ConfigError: replicas does not divide the number of ranks.
    """
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
    ):
        os.environ.setdefault(name, value)
    ranks = int(os.environ["WORLD_SIZE"])
    if replicas < 1 or ranks % replicas:
        raise ConfigError(f"parallel.replicas is {replicas}, which does not divide {ranks} ranks")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # torchrun's ranks share one store over all restarts, in which the addresses of dead ranks stay.
    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        shape = (replicas, ranks // replicas)
        yield init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
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


def parallelize(model: Retro, mesh: DeviceMesh, config: ParallelConfig) -> None:
    """Applies the configuration to the initialised model, in place: a group for each layer, one
    for embedding, head and final norms."""
    checkpoint_activations(model, config.activation_checkpointing)
    if config.compile:
        compile_layers(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy if config.precision == "bf16" else MixedPrecisionPolicy(),
    }
    for layer in [*_decoder_parts(model), *_encoder_layers(model)]:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def checkpoint_activations(model: Retro, layers: ActivationCheckpointing) -> None:
    """Lets layers keep their inputs only and compute the rest again in the backward pass."""
    chosen = {"none": [], "encoder": _encoder_layers(model)}
    chosen["full"] = [*_decoder_parts(model), *_encoder_layers(model)]
    for layer in chosen[layers]:
        layer.forward = _recomputing(layer.forward)


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own, in which the compiler recognises `checkpoint`."""

    def recomputing(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False)

    return recomputing


def compile_layers(model: Retro, **options: Any) -> None:
    """Compiles each layer by itself, with options of torch.compile."""
    for layer in [*_decoder_parts(model), *_encoder_layers(model)]:
        layer.compile(**options)


def _decoder_parts(model: Retro) -> list[nn.Module]:
    """What the model calls one by one: the layers, but of the split layer the halves."""
    parts: list[nn.Module] = []
    for i, layer in enumerate(model.decoder_layers):
        is_split = i == model.config.split_layer
        parts += [layer.attention_half, layer.feed_forward_half] if is_split else [layer]
    return parts


def _encoder_layers(model: Retro) -> list[nn.Module]:
    return list(model.encoder.layers) if model.encoder is not None else []


def sum_over_replicas(model: nn.Module, is_last: bool) -> None:
    """Whether the next backward pass sums gradients over the replicas: only the last of a step."""
    assert isinstance(model, FSDPModule)
    model.set_requires_all_reduce(is_last)


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks (in place)."""
    dist.all_reduce(value)
    return value
