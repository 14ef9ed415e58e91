"""Requests to stop between two steps: a signal, or an allowance of time or steps that is used up.

SIGTERM is what schedulers and torchrun send before they kill, SIGUSR1 what Slurm is told to send
(`--signal`). The step under way is finished.
"""

import signal
import time
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Notes signals while in its block.

    Args:
        after_steps: Steps of this process.
        after_seconds: Seconds of this process in the block.
    """

    def __init__(self, after_steps: int | None, after_seconds: float | None) -> None:
        self._after_steps, self._after_seconds = after_steps, after_seconds
        self._signal: str | None = None
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        self._before: dict[signal.Signals, Any] = {
            number: signal.signal(number, self._note) for number in _SIGNALS
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def reason(self, steps: int) -> str | None:
        """Why this rank wants to stop after so many steps of this process; None: it does not."""
        if self._signal is not None:
            return self._signal
        if self._after_steps is not None and steps >= self._after_steps:
            return "stop_after_steps"
        if self._after_seconds is not None:
            used = time.monotonic() - self._start
            return "stop_after_seconds" if used >= self._after_seconds else None
        return None
