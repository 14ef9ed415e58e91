"""Which index for how many vectors, on what memory and device, and why.

Numbers behind the rules: `benchmarks/index.py`, docs/log.md.
"""

from dataclasses import dataclass
from math import ceil, sqrt

EXACT_VECTORS_CPU = 200_000
_EXACT_VECTORS_CUDA = 30_000_000
_SPARE_BYTES = 600 << 20
_ID_BYTES = 8


@dataclass(frozen=True)
class IndexChoice:
    """factory: a Faiss factory string. merge_shards: whether one process can hold the whole index.
    index_bytes: about how large it is. least_shards: parts that fit a worker, if it is not merged.
    reasons: one sentence each."""

    factory: str
    merge_shards: bool
    index_bytes: int
    least_shards: int
    reasons: tuple[str, ...]


def default_lists(num_vectors: int) -> int:
    """NeMo's rule: 4 sqrt(N) inverted lists."""
    return max(1, int(4 * sqrt(num_vectors)))


def choose_index(
    num_vectors: int, dimension: int, worker_bytes: int, device: str, factory: str | None = None
) -> IndexChoice:
    """Exact search while that is affordable; above, inverted lists with the finest codes that fit a
    worker's memory; shards that are searched one by one if none do. A given factory is kept."""
    room = max(1, worker_bytes - _SPARE_BYTES)
    if factory is None:
        factory, reason = _factory(num_vectors, dimension, room, device)
    else:
        reason = f"{factory} was asked for"
    size = _index_bytes(factory, num_vectors, dimension)
    fits = size <= room
    memory = (
        f"about {_gib(size)} fit {_gib(room)} of a worker's memory: one merged index"
        if fits
        else f"about {_gib(size)} do not fit {_gib(room)} of a worker's memory: shards are kept "
        "apart, searched one by one, and their results merged"
    )
    return IndexChoice(factory, fits, size, ceil(size / room), (reason, memory))


def _factory(num_vectors: int, dimension: int, room: int, device: str) -> tuple[str, str]:
    exact = EXACT_VECTORS_CPU if device == "cpu" else _EXACT_VECTORS_CUDA
    if num_vectors <= exact:
        return "Flat", f"{num_vectors} vectors are at most {exact}: exact search on {device}"
    lists = default_lists(num_vectors)
    many = f"{num_vectors} vectors are more than {exact}: {lists} inverted lists"
    fine, coarse = f"IVF{lists},SQ8", f"IVF{lists},RaBitQ"
    if _index_bytes(fine, num_vectors, dimension) <= room:
        return fine, f"{many}, 8-bit codes"
    if _index_bytes(coarse, num_vectors, dimension) <= room:
        return coarse, (
            f"{many}; 8-bit codes would not fit a worker, so 1-bit codes (RaBitQ), ranked again by "
            "the stored vectors"
        )
    return fine, f"{many}, 8-bit codes"


def _index_bytes(factory: str, num_vectors: int, dimension: int) -> int:
    last = factory.rpartition(",")[2]
    if last.startswith("SQ8"):
        code = dimension
    elif last.startswith("RaBitQ"):
        code = ceil(dimension / 8) + 8
    elif last.startswith("PQ"):
        code = int("".join(filter(str.isdigit, last[2:].partition("x")[0])) or dimension)
    else:
        code = 4 * dimension
    return num_vectors * (code + _ID_BYTES)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
