"""export | `python -m jobs.export_model` | torch | reads a run's checkpoint and the tokenizer of
its dataset | writes model.safetensors, the tokenizer and config.json.
"""

import time
from dataclasses import dataclass
from typing import Any

from jobs.command_line import run_job
from model.export import Dtype, export_model


@dataclass(frozen=True)
class ExportConfig:
    """Writes a run's weights as a folder that opens without the run and its data. Run again,
    it does nothing.

    Attributes:
        run_url: Folder of the jobs.pretrain run.
        output_url: Folder for the exported model.
        dataset_url: Folder of a dataset with the run's tokenizer; by default the first dataset it
            was trained on. For data that was moved.
        dtype: Of the exported parameters.
        step: Of the checkpoint to export, one of those that were kept; by default the newest.
    """

    run_url: str
    output_url: str
    dataset_url: str | None = None
    dtype: Dtype = "float32"
    step: int | None = None


def run(config: ExportConfig) -> dict[str, Any]:
    started = time.monotonic()
    options = (config.dtype, config.dataset_url, config.step)
    result = export_model(config.run_url, config.output_url, *options)
    return {**result, "seconds": round(time.monotonic() - started, 2)}


if __name__ == "__main__":
    run_job("Export a run's model as safetensors.", ExportConfig, run)
