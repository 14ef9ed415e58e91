"""A progress line on stderr while Spark writes splits: splits done, documents, tokens, skipped
records.

Tasks add their counts to a Spark accumulator; a thread of the driver shows it. A task that ran
twice counts twice here; the manifests count it once.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from pyspark import SparkContext
from pyspark.accumulators import AccumulatorParam
from tqdm import tqdm

_SHOWN = ("documents", "tokens", "skipped")


class _Sum(AccumulatorParam):
    """Adds up counters."""

    def zero(self, value: dict[str, int]) -> dict[str, int]:  # type: ignore[override]
        return {}

    def addInPlace(  # type: ignore[override]
        self, value1: dict[str, int], value2: dict[str, int]
    ) -> dict[str, int]:
        return dict(Counter(value1) + Counter(value2))


class SplitProgress:
    """Shows the progress of `total` splits as long as the context lasts."""

    def __init__(self, context: SparkContext, total: int) -> None:
        self._counts: Any = context.accumulator({}, _Sum())
        self._bar = tqdm(total=total, desc="prepare", unit="split", file=sys.stderr, mininterval=2)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def counter(self) -> Callable[[dict[str, int]], None]:
        """What a task calls with its counts when its split is written; picklable."""
        counts = self._counts

        def add(found: dict[str, int]) -> None:
            counts.add({"splits": 1, **{name: found.get(name, 0) for name in _SHOWN}})

        return add

    def __enter__(self) -> "SplitProgress":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._show()
        self._bar.close()

    def _watch(self) -> None:
        while not self._ended.wait(2):
            self._show()

    def _show(self) -> None:
        counts = self._counts.value
        self._bar.set_postfix({name: counts.get(name, 0) for name in _SHOWN}, refresh=False)
        self._bar.n = min(counts.get("splits", 0), self._bar.total)
        self._bar.refresh()
