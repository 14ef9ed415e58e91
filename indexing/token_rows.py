"""Token ids of many texts, and the batches that they are embedded in.

Rows come from the dataset's encoder ids or from tokenized text; from here on both are the same, so
that the vectors cannot depend on where the ids came from. numpy only.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class TokenRows:
    """Row i holds `lengths[i]` ids from its left end on, special tokens included.

    Attributes:
        ids: Integers [N, width]; what stands behind a row's length means nothing.
        lengths: int64 [N].
    """

    ids: NDArray[Any]
    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, part: "slice | NDArray[Any]") -> "TokenRows":
        return TokenRows(self.ids[part], self.lengths[part])

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]]) -> "TokenRows":
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        inside = np.arange(lengths.max(initial=0)) < lengths[:, None]
        ids = np.zeros(inside.shape, np.int32)
        ids[inside] = np.fromiter((i for row in rows for i in row), np.int32, int(lengths.sum()))
        return cls(ids, lengths)

    @classmethod
    def from_filled(cls, ids: NDArray[Any], pad_id: int) -> "TokenRows":
        """Of rows [N, width] that are filled up with pad_id, which no row ends with."""
        used = ids != pad_id
        lengths = ids.shape[1] - np.argmax(used[:, ::-1], axis=1)
        return cls(ids, np.where(used.any(axis=1), lengths, 0).astype(np.int64))

    def equal_to(self, row: Sequence[int]) -> NDArray[np.bool_]:
        """[N] whether each row is `row`."""
        found = self.lengths == len(row)
        found[found] = (self.ids[found, : len(row)] == np.asarray(row, self.ids.dtype)).all(axis=1)
        return found

    def filled(
        self, where: NDArray[np.intp], pad_id: int, pads_left: bool, multiple: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(ids, mask) of the rows `where`: int64 [B, L], as wide as their longest, rounded up to a
        multiple; mask 1 marks ids, 0 pads."""
        lengths = self.lengths[where]
        width = -(-int(lengths.max()) // multiple) * multiple
        kept = np.arange(width) < lengths[:, None]
        target = kept[:, ::-1] if pads_left else kept
        ids = np.full(kept.shape, pad_id, np.int64)
        ids[target] = self.ids[where][:, :width][kept[:, : self.ids.shape[1]]]
        return ids, target.astype(np.int64)


def batches(rows: TokenRows, skip: NDArray[np.bool_], size: int) -> list[NDArray[np.intp]]:
    """Positions of rows, at most `size` together, alike in length; those marked in `skip` [N] are
    left out. A function of the rows alone: order is by length, then by position."""
    order = np.argsort(rows.lengths, kind="stable")
    order = order[~skip[order]]
    return [order[i : i + size] for i in range(0, len(order), size)]


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[Result]:
    """function(item) of each item, in order; as many threads work on the next items meanwhile."""
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
