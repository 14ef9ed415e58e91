"""Training steps as jobs.pretrain makes them, with retrieval and of the same decoder without it.

    python benchmarks/train.py --preset jobs/configs/demo.yaml --micro_batch_size 4
    python benchmarks/train.py --preset jobs/configs/150m.yaml --micro_batch_size 16 \
      --global_batch_size 64 --device cuda --precision bf16 --compile

    python benchmarks/train.py --micro_batch_size 2 --steps 8 --stream_latency_ms 20

Batches, forward and backward passes, optimizer, metrics and TensorBoard are included, checkpoints
and validation are not. Data are random documents with a random KNN map (benchmarks/samples.py).
Both sides take steps in turn in one process; the first steps, which allocate and compile, do not
count. With --stream_latency_ms a third side streams joined shards from an S3 server on loopback
whose replies come so late. The last line is JSON: by side the median seconds of a step, rates, MFU
(null where the peak of the hardware is not known) and the share of time spent waiting for data; the
overhead of retrieval in time and in operations.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import torch
import yaml
from torch.distributed.device_mesh import DeviceMesh

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.samples import make_reader
from benchmarks.streaming import join_data, other_process
from jobs.pretrain import PretrainConfig, model_config, trainer_of
from model.config import ModelConfig
from model.flops import training_flops
from model.initialization import initialize
from model.metrics import MetricsConfig, MetricsLog
from model.optimizer import OptimConfig
from model.parallel import ParallelConfig, parallelize, process_group
from model.prefetch import Prefetcher
from model.retro import Retro
from model.trainer import TrainerConfig
from model.training_data import DataConfig, open_data

_LENGTH, _LOG_INTERVAL = 2048, 10


class Side:
    """A run of its own, step by step."""

    def __init__(self, name: str, config: PretrainConfig, mesh: DeviceMesh) -> None:
        self.name, self.seconds = name, []
        data = open_data(config.data, bool(config.model.dec_cross_attention), 0)
        data.open_all()
        model = Retro(model_config(config, data.about, None))
        initialize(model, 0)
        model.to(config.device)
        parallelize(model, mesh, config.parallel)
        self.parameters = sum(p.numel() for p in model.parameters())
        neighbors = data.train.neighbors
        self.flops = training_flops(model.config, _LENGTH, neighbors) / _LENGTH
        self.trainer = trainer_of(config, model, mesh, data, None)
        self.batches = Prefetcher(self.trainer.batches, self.trainer.device, 0, 1 << 40)
        self.log = MetricsLog(MetricsConfig(), config.output_url, 0, {})
        self.rates: dict[str, Any] = {}

    def step(self) -> None:
        with self.trainer.throughput.step():
            start = time.perf_counter()
            values, _ = self.trainer.train_step(self.batches, False)
            if self.trainer.step % _LOG_INTERVAL == 0:
                self.log.write(self.trainer.step, values)
        self.seconds.append(time.perf_counter() - start)

    def start_counting(self) -> None:
        self.seconds.clear()
        self.trainer.throughput.report()

    def result(self) -> dict[str, Any]:
        rates = self.trainer.throughput.report()
        shares = {"parameters": self.parameters, "flops_per_token": self.flops}
        return {"step_s": statistics.median(self.seconds), **rates, **shares}

    def close(self) -> None:
        self.batches.close()
        self.log.close()


def configurations(arguments: argparse.Namespace, folder: Path) -> dict[str, PretrainConfig]:
    preset = yaml.safe_load(Path(arguments.preset).read_text())["model"]
    shape = {k: tuple(v) if isinstance(v, list) else v for k, v in preset.items()}
    data = DataConfig(
        train_url=str(folder / "train"),
        train_map_url=str(folder / "map"),
        retrieval_url=str(folder / "retrieval"),
        seq_length=_LENGTH,
    )
    retro = PretrainConfig(
        output_url=str(folder / "retro"),
        data=data,
        model=ModelConfig(**shape),
        trainer=TrainerConfig(
            max_steps=1 << 40,
            global_batch_size=arguments.global_batch_size or arguments.micro_batch_size,
            micro_batch_size=arguments.micro_batch_size,
        ),
        optim=OptimConfig(lr=1e-4),
        parallel=ParallelConfig(
            precision=arguments.precision,
            activation_checkpointing=arguments.activation_checkpointing,
            compile=arguments.compile,
        ),
        device=arguments.device,
    )
    plain = replace(
        retro,
        output_url=str(folder / "decoder"),
        data=replace(data, train_map_url=None, retrieval_url=None),
        model=replace(retro.model, dec_cross_attention=()),
    )
    return {"retro": retro, "decoder": plain}


def streamed(retro: PretrainConfig, folder: Path) -> PretrainConfig:
    """The same run from joined shards on the S3 server."""
    filesystem = fsspec.filesystem("s3")
    filesystem.mkdir("train")
    filesystem.put(join_data(folder, block=16).url, "train/joined", recursive=True)
    data = DataConfig(joined_url="s3://train/joined", seq_length=_LENGTH, window_blocks=16)
    return replace(retro, output_url=str(folder / "streamed"), data=data)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="jobs/configs/demo.yaml")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32", choices=["32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--activation_checkpointing", default="none")
    parser.add_argument("--micro_batch_size", type=int, default=4)
    parser.add_argument("--global_batch_size", type=int)
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--stream_latency_ms", type=float)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        mesh = stack.enter_context(process_group(arguments.device, 1))
        make_reader(folder, arguments.chunks, 4)
        found = configurations(arguments, folder)
        if arguments.stream_latency_ms is not None:
            server = other_process(arguments.stream_latency_ms / 1000)
            os.environ |= stack.enter_context(server)
            found["streamed"] = streamed(found["retro"], folder)
        sides = [Side(side, config, mesh) for side, config in found.items()]
        for i in range(arguments.warmup + arguments.steps):
            for side in sides:
                if i == arguments.warmup:
                    side.start_counting()
                side.step()
                print(f"{side.name}: {side.seconds[-1]:.3f} s", file=sys.stderr)
        results = {side.name: side.result() for side in sides}
        for side in sides:
            side.close()
    retro, plain = results["retro"], results["decoder"]
    on_gpu = arguments.device == "cuda"
    print(
        json.dumps(
            {
                **results,
                "retrieval_overhead_time": retro["step_s"] / plain["step_s"] - 1,
                "retrieval_overhead_flops": retro["flops_per_token"] / plain["flops_per_token"] - 1,
                "device": torch.cuda.get_device_name() if on_gpu else "cpu",
                **vars(arguments),
            }
        )
    )


if __name__ == "__main__":
    main()
