"""Metrics of a run: `metrics.jsonl`, TensorBoard event files and Weights & Biases. Rank 0 only."""

import importlib
import json
import tempfile
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, cast

from torch.utils.tensorboard import SummaryWriter

from etl.storage import content_key, filesystem_of, is_local, join_url
from model.config import ConfigError

NAME = "metrics.jsonl"


@dataclass(frozen=True)
class MetricsConfig:
    """Where metrics go besides metrics.jsonl.

    Attributes:
        interval: Steps between metrics.
        tensorboard: Write event files into the folder `tensorboard` of the run.
        wandb_project: Also log to this project of Weights & Biases (pip install wandb); its own
            variables hold there, as WANDB_MODE=offline.
    """

    interval: int = 10
    tensorboard: bool = True
    wandb_project: str | None = None


class MetricsLog:
    """Appends one JSON object a line. A resumed run drops what a killed one wrote after the
    checkpoint.

    On object storage, which cannot append, the files grow locally and are uploaded by `sync`.

    Raises:
        ConfigError: wandb is asked for and not installed.
    """

    def __init__(
        self, config: MetricsConfig, run_url: str, resumed_step: int, about: dict[str, Any]
    ) -> None:
        self._url = run_url
        self.folder = (
            Path(filesystem_of(run_url)[1])
            if is_local(run_url)
            else Path(tempfile.mkdtemp(prefix="retromill-"))
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / NAME
        kept = [line for line in read_lines(run_url) if line["step"] <= resumed_step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115
        self._board = self._wandb = None
        if config.tensorboard:
            events = str(self.folder / "tensorboard")
            self._board = SummaryWriter(events, purge_step=resumed_step + 1)
        if config.wandb_project is not None:
            self._wandb = _start_wandb(config.wandb_project, run_url, self.folder, about)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Values that are unknown (None) or not finite are null in the file and left out
        elsewhere."""
        known = {k: v for k, v in values.items() if v is not None and isfinite(v)}
        line = {"step": step, **{name: known.get(name) for name in values}}
        self._file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in known.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(known, step=step)

    def sync(self) -> None:
        self._file.flush()
        if self._board is not None:
            self._board.flush()
        if not is_local(self._url):
            filesystem, path = filesystem_of(self._url)
            for file in (p for p in self.folder.rglob("*") if p.is_file()):
                filesystem.put_file(str(file), f"{path}/{file.relative_to(self.folder)}")

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()
        if self._board is not None:
            self._board.close()
        self.sync()
        self._file.close()


def _start_wandb(project: str, run_url: str, folder: Path, about: dict[str, Any]) -> Any:
    """A run that is continued, under the same id, when the job is started again."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise ConfigError(
            f"metrics.wandb_project is {project}, but wandb is not installed: pip install wandb"
        ) from None
    return wandb.init(
        project=project,
        id=content_key(run_url)[:16],
        name=run_url.rstrip("/").rpartition("/")[2],
        dir=str(folder),
        config=about,
        resume="allow",
    )


def read_lines(run_url: str) -> list[dict[str, Any]]:
    """All complete lines of a run's metrics; [] before the first."""
    filesystem, path = filesystem_of(join_url(run_url, NAME))
    filesystem.invalidate_cache()
    if not filesystem.exists(path):
        return []
    complete = bytes(cast(Any, filesystem.cat_file(path))).decode().rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]
