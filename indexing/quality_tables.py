"""What is counted in the tables of `indexing/quality_rows.py`: hubs, where neighbors come from,
equal chunks. dask.dataframe on pandas or cuDF; both give the same numbers.

The choice acts on the file reader and all that follows from it: nothing here names pandas. Groups
stay in partitions, and what is computed is small; rows have no order, so results are sorted or
sums.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import dask.dataframe as dd
import numpy as np
from dask import config as dask_config
from dask.base import compute
from numpy.typing import NDArray

from indexing.quality_rows import ORIGINS

Backend = Literal["pandas", "cudf"]


def check_backend(backend: Backend) -> None:
    """Raises ValueError unless the back-end can be used."""
    missing = [name for name in ("cudf", "dask_cudf") if not find_spec(name)]
    if backend == "cudf" and missing:
        raise ValueError(
            f"backend is cudf, but {' and '.join(missing)} cannot be imported; install RAPIDS "
            "(pip install -e .[index-gpu]) on a machine with an NVIDIA GPU, or use backend pandas"
        )


def in_this_process() -> Any:
    """A context in which tables are counted by threads of this process, whatever Dask client there
    is or was: its workers may not see the folder."""
    return dask_config.set({"scheduler": "threads", "dataframe.shuffle.method": "tasks"})


@dataclass(frozen=True)
class Tables:
    """The folders of Parquet files, and what reads them."""

    folder: Path
    backend: Backend

    def read(self, name: str) -> Any:
        with dask_config.set({"dataframe.backend": self.backend}):
            return dd.read_parquet(str(self.folder / name))

    def stored(self, name: str, frame: Any) -> Any:
        """The frame out of files, so that what follows several times computes it once."""
        frame.to_parquet(str(self.folder / name), write_index=False)
        return self.read(name)


@dataclass(frozen=True)
class GroupSizes:
    """How many groups [n] have each size [n]; sizes ascend."""

    sizes: NDArray[np.int64]
    groups: NDArray[np.int64]

    @property
    def members(self) -> int:
        return int((self.sizes * self.groups).sum())

    @property
    def repeated(self) -> "GroupSizes":
        """Without groups of one."""
        several = self.sizes > 1
        return GroupSizes(self.sizes[several], self.groups[several])


def _grouped(frame: Any, column: str) -> Any:
    """Columns `column` and size, a row a group, in partitions."""
    partitions = max(1, frame.npartitions // 8)
    sizes = frame.groupby(column).size(split_out=partitions)
    return sizes.to_frame("size").reset_index()


def _histogram(grouped: Any) -> GroupSizes:
    found = grouped["size"].value_counts().compute().sort_index()
    return GroupSizes(found.index.to_numpy().astype(np.int64), found.to_numpy().astype(np.int64))


def equal_chunks(tables: Tables) -> dict[str, GroupSizes]:
    """Groups of chunks with equal tokens and with equal vectors, of two chunks or more; chunks
    without text, or without a vector, are left out."""
    chunks = tables.read("chunks")
    parts = {
        "tokens": (chunks[chunks["has_text"] == 1], "tokens_hash"),
        "vectors": (chunks[chunks["is_found"] == 1], "vector_hash"),
    }
    return {name: _histogram(_grouped(*part)).repeated for name, part in parts.items()}


@dataclass(frozen=True)
class InDegrees:
    """How often chunks are neighbors: how many were that often, and the most frequent ones as
    (chunk id, times), most frequent first, then by id."""

    histogram: GroupSizes
    top: list[tuple[int, int]]


def in_degrees(tables: Tables, num_chunks: int, top: int) -> InDegrees:
    degrees = tables.stored("degrees", _grouped(tables.read("slots"), "neighbor"))
    # One number for both sorts without ties: which of several rows comes first would depend on
    # partitions.
    rank = degrees["size"] * num_chunks + (num_chunks - 1 - degrees["neighbor"])
    best = np.sort(rank.nlargest(top).compute().to_numpy())[::-1]
    times, left = np.divmod(best, num_chunks)
    pairs = zip((num_chunks - 1 - left).tolist(), times.tolist(), strict=True)
    return InDegrees(_histogram(degrees), list(pairs))


def affinity(tables: Tables, least_runs: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Share of slots whose neighbor comes from the same file, folder, package as its query: of all
    slots, and of those whose overlap was measured and is at least each of `least_runs`."""
    pairs = tables.read("slots")
    for side in ("query", "neighbor"):
        documents = tables.read("query_documents" if side == "query" else "documents")
        names = {name: f"{side}_{name}" for name in ("document", *ORIGINS)}
        documents = documents[list(names)].rename(columns=names)
        pairs = pairs.merge(documents, on=f"{side}_document", how="inner")
    pairs = pairs.assign(
        **{name: pairs[f"query_{name}"] == pairs[f"neighbor_{name}"] for name in ORIGINS}
    )
    parts = {"all": pairs, **{f"run_{n}": pairs[pairs["run"] >= n] for n in least_runs}}
    sums = {
        name: {"slots": part["run"].size, **{key: part[key].sum() for key in ORIGINS}}
        for name, part in parts.items()
    }
    [counts] = compute(sums)
    return {name: _shares(found) for name, found in counts.items()}


def _shares(counts: dict[str, Any]) -> dict[str, float]:
    slots = int(counts["slots"])
    return {"slots": slots} | {name: int(counts[name]) / max(1, slots) for name in ORIGINS}


def expected_affinity(tables: Tables, own_are_banned: bool) -> dict[str, float]:
    """The same shares if every neighbor were any indexed chunk, drawn evenly: from those outside
    the query's document and its cluster, if these are banned."""
    slots = _grouped(tables.read("slots"), "query_document").rename(
        columns={"query_document": "document", "size": "slots"}
    )
    queries = slots.merge(tables.read("query_documents"), on="document", how="inner")
    queries = tables.stored("counted_queries", queries)
    chunks = tables.read("chunks")
    found = _grouped(chunks[chunks["is_found"] == 1], "document")
    documents = tables.read("documents").merge(found, on="document", how="inner")
    documents = tables.stored("counted_documents", documents)
    total = documents["size"].sum().compute()
    hits = {name: _hits(queries, documents, name, int(total), own_are_banned) for name in ORIGINS}
    [found] = compute(hits | {"slots": queries["slots"].sum()})
    return {name: float(found[name]) / max(1, int(found["slots"])) for name in ORIGINS}


def _hits(queries: Any, documents: Any, origin: str, total: int, own_are_banned: bool) -> Any:
    """How many slots are expected to hold a neighbor of their query's `origin`, uncomputed."""
    same = _sums(documents, [origin], "same")
    pairs = queries.merge(same, on=origin, how="left")
    near, candidates = pairs["same"].fillna(0), total
    if own_are_banned:
        banned = _sums(documents, ["cluster"], "banned")
        inside = _sums(documents, [origin, "cluster"], "inside")
        pairs = pairs.merge(banned, on="cluster", how="left")
        pairs = pairs.merge(inside, on=[origin, "cluster"], how="left")
        near = pairs["same"].fillna(0) - pairs["inside"].fillna(0)
        candidates = total - pairs["banned"].fillna(0)
    return (pairs["slots"] * near / candidates).sum()


def _sums(documents: Any, keys: list[str], name: str) -> Any:
    """Columns `keys` and `name`, the number of indexed chunks of the documents that agree in
    them."""
    sums = documents.groupby(keys)["size"].sum()
    return sums.to_frame(name).reset_index()
