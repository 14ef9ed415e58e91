"""Metrics of a run: `metrics.jsonl` and TensorBoard event files in the run's folder. Rank 0
only."""

import json
import tempfile
from pathlib import Path
from typing import Any, cast

from torch.utils.tensorboard import SummaryWriter

from etl.storage import filesystem_of, is_local, join_url

NAME = "metrics.jsonl"


class MetricsLog:
    """Appends one JSON object a line. A resumed run drops what a killed one wrote after the
    checkpoint.

    On object storage, which cannot append, the files grow locally and are uploaded by `sync`.
    """

    def __init__(self, run_url: str, resumed_step: int) -> None:
        self._url = run_url
        self._local = (
            Path(filesystem_of(run_url)[1])
            if is_local(run_url)
            else Path(tempfile.mkdtemp(prefix="retromill-"))
        )
        self._local.mkdir(parents=True, exist_ok=True)
        path = self._local / NAME
        kept = [line for line in read_lines(run_url) if line["step"] <= resumed_step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115
        self._board = SummaryWriter(str(self._local / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        self._file.flush()
        self._board.flush()
        if not is_local(self._url):
            filesystem, path = filesystem_of(self._url)
            for file in (p for p in self._local.rglob("*") if p.is_file()):
                filesystem.put_file(str(file), f"{path}/{file.relative_to(self._local)}")

    def close(self) -> None:
        self.sync()
        self._board.close()
        self._file.close()


def read_lines(run_url: str) -> list[dict[str, Any]]:
    """All complete lines of a run's metrics; [] before the first."""
    filesystem, path = filesystem_of(join_url(run_url, NAME))
    filesystem.invalidate_cache()
    if not filesystem.exists(path):
        return []
    complete = bytes(cast(Any, filesystem.cat_file(path))).decode().rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]
