"""shapes | `python -m jobs.mup_shapes` | – | reads a base and a delta configuration | writes the
muP shape file that `jobs.pretrain` takes.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from etl.storage import write_atomically
from jobs.command_line import run_job
from model.config import ModelConfig, RetroConfig
from model.mup import base_shapes, to_yaml


@dataclass(frozen=True)
class MupShapesConfig:
    """Finds which dimensions of the parameters grow with width: those that differ between two
    models. Nothing is allocated.

    Attributes:
        output_url: The shape file to write (YAML).
        base: The narrow model on which hyper-parameters are found; the trained model may differ
            from it in widths and depth.
        delta: The same with other widths: hidden_size, ffn_hidden_size, and heads or their width.
    """

    output_url: str
    base: ModelConfig = field(default_factory=ModelConfig)
    delta: ModelConfig = field(default_factory=ModelConfig)


def run(config: MupShapesConfig) -> dict[str, Any]:
    pair = [RetroConfig(**asdict(model), vocab_size=128) for model in (config.base, config.delta)]
    shapes = base_shapes(*pair)
    write_atomically(config.output_url, lambda file: file.write(to_yaml(shapes).encode()))
    grown = [sum(size is not None for size in row) for row in shapes.values()]
    counts = {f"ninf_{n}": grown.count(n) for n in (0, 1, 2)}
    return {"shape_file": config.output_url, "parameters": len(grown), **counts}


if __name__ == "__main__":
    run_job("Write a muP shape file.", MupShapesConfig, run)
