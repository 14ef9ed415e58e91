"""check | `python -m jobs.coord_check` | torch | reads nothing | writes coordinates.json and
coordinates.png: activations by width, under muP and in the standard parametrisation.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from etl.storage import join_url, put_file, scratch_folder, write_json
from jobs.command_line import run_job
from model.config import ModelConfig
from model.coord_check import Coordinates, check, growth


@dataclass(frozen=True)
class CoordCheckConfig:
    """Trains narrow and wide models for a few steps and compares the size of their activations.

    Attributes:
        output_url: Folder for coordinates.json and coordinates.png.
        model: The narrowest model; its hidden_size is the base width.
        widths: Multiples of its hidden_size that are tried.
        steps: Training steps of each model.
        lr: Learning rate of every step.
        seed: Of initial weights and the made-up batch.
    """

    output_url: str
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            hidden_size=64,
            ffn_hidden_size=256,
            num_attention_heads=2,
            dec_num_layers=3,
            dec_cross_attention=(1, 2),
            init_method_std=0.1,
        )
    )
    widths: tuple[int, ...] = (1, 2, 4, 8)
    steps: int = 5
    lr: float = 0.002
    seed: int = 0


def run(config: CoordCheckConfig) -> dict[str, Any]:
    if len(config.widths) < 2 or config.steps < 1 or min(config.widths) != 1:
        raise ValueError(
            f"widths {list(config.widths)} and steps {config.steps}; expected two widths or more, "
            "the narrowest 1, and at least one step"
        )
    widths = [config.model.hidden_size * n for n in sorted(config.widths)]
    found = check(config.model, widths, config.steps, config.lr, config.seed)
    exponents = growth(found)
    rows = [asdict(c) for c in found]
    with scratch_folder(config.output_url) as scratch:
        plot(found, scratch / "coordinates.png")
        put_file(scratch / "coordinates.png", join_url(config.output_url, "coordinates.png"))
    write_json(join_url(config.output_url, "coordinates.json"), rows)
    largest = {name: max(parts.values()) for name, parts in exponents.items()}
    return {"output_url": config.output_url, "largest_exponent": largest, "exponents": exponents}


def plot(found: list[Coordinates], path: Path) -> None:
    """One panel for each parametrisation: sizes in the last step against width, a line a part."""
    from matplotlib.figure import Figure

    last = max(c.step for c in found)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    titles = {"sp": "standard parametrisation", "mup": "muP"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        chosen = [c for c in found if c.parametrization == name and c.step == last]
        for part in dict.fromkeys(c.part for c in chosen):
            points = [(c.width, c.size) for c in chosen if c.part == part]
            axis.plot(*zip(*points, strict=True), marker="o", label=part)
        axis.set(xscale="log", yscale="log", xlabel="width", title=title)
        axis.set_xticks([c.width for c in chosen], [str(c.width) for c in chosen])
        axis.minorticks_off()
    axes[0].set_ylabel(f"mean |output| in step {last + 1}")
    axes[1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_job("Check activations by width.", CoordCheckConfig, run)
