"""Does the best learning rate of a narrow model hold for a wide one, with muP and without?

    python benchmarks/learning_rate_transfer.py --data FOLDER [--plot docs/mup_transfer.png]

Trains plain decoders of several widths on the same samples at each of a row of learning rates, in
the standard parametrisation and under muP (base: the narrowest), and prints a table of losses: the
mean over the last fifth of the steps. FOLDER is a training dataset of jobs.prepare_data. The last
line is JSON.
"""

import argparse
import json
import sys
from dataclasses import asdict
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from etl.dataset import Dataset
from model.config import ModelConfig, RetroConfig
from model.coord_check import parametrized, widened
from model.evaluation import token_losses
from model.mup import BaseShapes, base_shapes
from model.optimizer import OptimConfig, learning_rate, set_learning_rate
from model.sampler import sample_ids
from model.samples import SampleReader


def train(
    config: RetroConfig,
    shapes: BaseShapes | None,
    reader: SampleReader,
    lr: float,
    arguments: argparse.Namespace,
) -> float:
    """Mean loss of the last fifth of the steps; inf if it is no number."""
    optim = OptimConfig(lr=lr, warmup_steps=arguments.steps // 10)
    model, optimizer = parametrized(config, shapes, optim, arguments.seed)
    losses = []
    for step in range(arguments.steps):
        set_learning_rate(optimizer, learning_rate(optim, step, arguments.steps))
        places = step * arguments.batch + np.arange(arguments.batch)
        ids = sample_ids(places, reader.num_samples, arguments.seed)
        batch = reader.read(ids).to("cpu")
        loss = token_losses(model, batch, False, batch.loss_mask).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    found = float(np.mean(losses[-max(1, arguments.steps // 5) :]))
    return found if isfinite(found) else inf


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    titles = {"sp": "standard parametrisation", "mup": "muP"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        chosen = [row for row in rows if row["parametrization"] == name]
        for width in dict.fromkeys(row["width"] for row in chosen):
            points = [(row["lr"], row["loss"]) for row in chosen if row["width"] == width]
            axis.plot(*zip(*points, strict=True), marker="o", label=f"width {width}")
        axis.set(xscale="log", xlabel="learning rate", title=title)
    axes[0].set_ylabel("training loss")
    axes[1].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="folder of a training dataset")
    parser.add_argument("--widths", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--log2_lrs", type=int, nargs="*", default=list(range(-11, -3)))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    dataset = Dataset(arguments.data)
    reader = SampleReader(dataset, arguments.length)
    narrow = ModelConfig(
        hidden_size=arguments.widths[0],
        ffn_hidden_size=4 * arguments.widths[0],
        num_attention_heads=arguments.widths[0] // 32,
        dec_num_layers=2,
        dec_cross_attention=(),
        init_method_std=0.1,
    )
    known = {"vocab_size": dataset.manifest.vocab_size, "eod_id": dataset.manifest.eod_id}
    known |= {"chunk_size": dataset.chunk_size}
    config = lambda width: RetroConfig(**asdict(widened(narrow, width)), **known)
    shapes = base_shapes(config(arguments.widths[0]), config(2 * arguments.widths[0]))
    rows = []
    for width in arguments.widths:
        for name, given in (("sp", None), ("mup", shapes)):
            for power in arguments.log2_lrs:
                loss = train(config(width), given, reader, 2.0**power, arguments)
                rows.append(
                    {"parametrization": name, "width": width, "lr": 2.0**power, "loss": loss}
                )
                print(f"{name} width {width} lr 2^{power}: {loss:.3f}", file=sys.stderr)
    best = {
        name: {
            width: min(
                (r for r in rows if r["parametrization"] == name and r["width"] == width),
                key=lambda r: r["loss"],
            )["lr"]
            for width in arguments.widths
        }
        for name in ("sp", "mup")
    }
    if arguments.plot:
        plot(rows, arguments.plot)
    print(json.dumps({"best_lr": best, "rows": rows}))


if __name__ == "__main__":
    main()
