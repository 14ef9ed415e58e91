"""A training step of the model against retro-pytorch's at equal shapes, on one device.

    pip install --no-deps retro-pytorch==0.3.9 einops
    python benchmarks/model_step.py [--device cuda --dtype bfloat16 --compile]

Both take the same tokens and neighbors, forward, backward and AdamW (ours as our trainer makes it,
theirs as theirs does), in turn in one process; times are medians. Peak memory is that of a process
of its own for each side: resident memory of two steps on a CPU, what torch allocated on CUDA.
retro-pytorch has 8 heads of 64 whatever its argument says, and absolute positions beside rotary
ones; otherwise the shapes are the same. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.config import RetroConfig
from model.flops import training_flops
from model.initialization import initialize
from model.optimizer import OptimConfig, build_optimizer
from model.retro import Retro

_HEADS, _HEAD_WIDTH = 8, 64


def config_of(arguments: argparse.Namespace) -> RetroConfig:
    return RetroConfig(
        hidden_size=arguments.hidden_size,
        ffn_hidden_size=4 * arguments.hidden_size,
        num_attention_heads=_HEADS,
        kv_channels=_HEAD_WIDTH,
        dec_num_layers=arguments.layers,
        dec_cross_attention=tuple(range(2, arguments.layers, 3)),
        enc_num_layers=2,
        enc_cross_attention=(0,),
        vocab_size=arguments.vocab_size,
        make_vocab_size_divisible_by=1,
        eod_id=1,
        chunk_size=64,
    )


def inputs(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """(tokens [B, L + 1], neighbors [B, C, K, 128]), without pads (0) and ends (1)."""
    generator = torch.Generator().manual_seed(0)
    batch, length = arguments.batch, arguments.length
    draw = lambda *shape: torch.randint(2, arguments.vocab_size, shape, generator=generator)
    tokens, neighbors = draw(batch, length + 1), draw(batch, length // 64, arguments.neighbors, 128)
    return tokens.to(arguments.device), neighbors.to(arguments.device)


def our_step(arguments: argparse.Namespace) -> Callable[[], None]:
    config = config_of(arguments)
    model = Retro(config)
    initialize(model, 0)
    model.to(arguments.device, getattr(torch, arguments.dtype))
    if arguments.compile:
        for layer in model.decoder_layers:
            layer.attention_half.compile()
            layer.feed_forward_half.compile()
        assert model.encoder is not None
        for layer in model.encoder.layers:
            layer.compile()
    tokens, neighbors = inputs(arguments)
    given = (tokens[:, :-1], tokens[:, :-1] > 0, neighbors, neighbors > 0)
    labels = tokens[:, 1:].contiguous()
    optimizer = build_optimizer(OptimConfig(lr=1e-4), model)
    return step_of(optimizer, lambda: model(*given, labels, labels > 0).mean())


def their_step(arguments: argparse.Namespace) -> Callable[[], None]:
    stand_in: Any = ModuleType("autofaiss")  # imported, not used: it needs numpy 1
    stand_in.build_index = None
    sys.modules.setdefault("autofaiss", stand_in)
    retro_pytorch: Any = __import__("retro_pytorch")
    config = config_of(arguments)
    model = retro_pytorch.RETRO(
        num_tokens=config.vocab_size,
        max_seq_len=arguments.length,
        enc_dim=config.hidden_size,
        enc_depth=config.enc_num_layers,
        enc_cross_attn_layers=tuple(i + 1 for i in config.enc_cross_attention),
        dec_dim=config.hidden_size,
        dec_depth=config.dec_num_layers,
        dec_cross_attn_layers=tuple(i + 1 for i in config.dec_cross_attention),
        dim_head=_HEAD_WIDTH,
        chunk_size=config.chunk_size,
    )
    model.to(arguments.device, getattr(torch, arguments.dtype)).train()
    tokens, neighbors = inputs(arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return step_of(optimizer, lambda: model(tokens, neighbors, return_loss=True))


def step_of(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


SIDES = {"ours": our_step, "retro_pytorch": their_step}


def seconds(step: Callable[[], None], device: str) -> float:
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(side: str, arguments: argparse.Namespace) -> int:
    """Of two steps, in a process of its own, without what it held before it made the model."""
    options = [f"--{k}={v}" for k, v in vars(arguments).items() if k not in ("compile", "side")]
    options += ["--compile"] if arguments.compile else []
    command = [sys.executable, __file__, f"--side={side}", *options]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure_peak(arguments: argparse.Namespace) -> int:
    before = resident_peak()
    step = SIDES[arguments.side](arguments)
    step()
    step()
    if arguments.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident_peak() - before


def resident_peak() -> int:
    """Most bytes that were resident; what getrusage says includes what the parent process had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="compile our layers")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--neighbors", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=list(SIDES), help="only print its peak memory")
    arguments = parser.parse_args()
    if arguments.side:
        print(measure_peak(arguments))
        return
    has_peer = find_spec("retro_pytorch") is not None
    steps = {side: make(arguments) for side, make in SIDES.items() if side == "ours" or has_peer}
    for step in steps.values():
        step()  # first steps allocate and compile
    times: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(arguments.rounds):
        for side, step in steps.items():
            times[side].append(seconds(step, arguments.device))
            print(f"{side}: {times[side][-1]:.3f} s a step", file=sys.stderr)
    peaks = {side: peak_bytes(side, arguments) for side in steps}
    median = {side: statistics.median(found) for side, found in times.items()}
    tokens = arguments.batch * arguments.length
    flops = training_flops(config_of(arguments), arguments.length, arguments.neighbors)
    result: dict[str, Any] = {
        "seconds": median,
        "peak_bytes": peaks,
        "tokens_per_s": tokens / median["ours"],
        "tflops": arguments.batch * flops / median["ours"] / 1e12,
    }
    if has_peer:
        result["speed_vs_retro_pytorch"] = median["retro_pytorch"] / median["ours"]
        result["memory_vs_retro_pytorch"] = peaks["ours"] / peaks["retro_pytorch"]
    else:
        missing = "retro-pytorch is not installed: pip install --no-deps retro-pytorch einops"
        print(missing, file=sys.stderr)
        result |= {"speed_vs_retro_pytorch": None, "memory_vs_retro_pytorch": None}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
