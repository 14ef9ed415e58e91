"""The golden files: a folder of cases that any implementation of the formats must reproduce."""

import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(
    os.environ.get("RETRO_CONFORMANCE") or Path(__file__).parents[1] / "data" / "conformance"
)


def cases(kind: str, key: str = "cases") -> list[Any]:
    """The cases that a sub-folder lists; it must list some."""
    found = json.loads((FOLDER / kind / "cases.json").read_text())[key]
    assert found, f"{FOLDER / kind}: no {key}"
    return found
