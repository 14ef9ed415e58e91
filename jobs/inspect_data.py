"""inspect | `python -m jobs.inspect_data` | one process | reads the folder of a dataset, a KNN map
or a joined dataset | writes what is in it: a summary on stderr, last line on stdout.
"""

import sys
from dataclasses import dataclass
from typing import Any

from indexing.inspection import describe, summary
from jobs.command_line import run_job


@dataclass(frozen=True)
class InspectConfig:
    """Shows what is in an artefact; its manifest says which kind it is.

    Attributes:
        url: Folder of a dataset, a KNN map or a joined dataset.
        show: Show this many of the first documents as text, rows of neighbor ids, or samples as
            token ids.
    """

    url: str
    show: int = 0


def run(config: InspectConfig) -> dict[str, Any]:
    about = describe(config.url, config.show)
    print(summary(about), file=sys.stderr)
    return about


if __name__ == "__main__":
    run_job("Show what is in a dataset, a KNN map or a joined dataset.", InspectConfig, run)
