"""Which dataset a document belongs to: named by its record, by a list, or by the hash of its
cluster. And what becomes of duplicates."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import orjson

from etl.manifest import HELD_OUT, Split
from etl.records import SPLIT_NAMES, Document
from etl.sources import InputError
from etl.storage import read_bytes

SPLITS = cast(tuple[Split, ...], SPLIT_NAMES)


class Fate(NamedTuple):
    """What duplicate detection found about a document that is not alone.

    cluster_hash: content hash of the first document of its cluster. is_held_out: a document of the
    cluster that is kept was named as held out. has_assigned: one that is kept goes where the hash
    of the cluster sends it.
    """

    reason: str | None
    cluster_hash: bytes
    is_held_out: bool
    has_assigned: bool


@dataclass(frozen=True)
class SplitRule:
    """How documents are assigned; picklable.

    Attributes:
        weights: Of the splits, adding up to 1, for the assignment by hash.
        seed: Another seed is another assignment.
        listed: Split by document id.
        retrieval: Whether there is a retrieval dataset.
    """

    weights: Mapping[Split, float]
    seed: int
    listed: Mapping[str, Split]
    retrieval: bool

    def named(self, document: Document) -> Split | None:
        """The split that the record or the list names."""
        if document.split:
            return cast(Split, document.split)
        return self.listed.get(document.id) if document.id is not None else None

    def split_of(self, document: Document, fate: Fate | None) -> Split:
        """Documents of a cluster go to the same split, unless one is named."""
        by = document.content_hash if fate is None else fate.cluster_hash
        return self.named(document) or assign_split(by, self.weights, self.seed)

    def is_held_back(self, split: Split, fate: Fate | None) -> bool:
        """Whether a document of this split must stay out of the retrieval set."""
        if split in HELD_OUT:
            return True
        if fate is None:
            return False
        assigned = assign_split(fate.cluster_hash, self.weights, self.seed)
        return fate.is_held_out or (fate.has_assigned and assigned in HELD_OUT)


@dataclass(frozen=True)
class DuplicateRule:
    """duplicates: drop documents whose text stood earlier in the input, or keep them.
    near_duplicates: keep (not looked for), mark (clusters are recorded) or drop (the first of a
    cluster stays). threshold: Jaccard similarity of word shingles from which texts are near."""

    duplicates: Literal["drop", "keep"]
    near_duplicates: Literal["keep", "mark", "drop"]
    threshold: float

    @property
    def is_near(self) -> bool:
        return self.near_duplicates != "keep"


def parse_weights(splits_string: str) -> dict[Split, float]:
    """Weights that add up to 1, from "train,validation,test" or "train,validation,test,retrieval".

    Raises:
        InputError: not three or four numbers, a negative one, or all zero.
    """
    try:
        weights = [float(part) for part in splits_string.replace("/", ",").split(",")]
    except ValueError:
        weights = []
    if len(weights) not in (3, 4) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise InputError(
            f"splits_string is {splits_string!r}; expected three or four weights, as 98,1,1 "
            "(train, validation, test) or 50,1,1,48 (and retrieval)"
        )
    weights += [0.0] * (4 - len(weights))
    return {split: weight / sum(weights) for split, weight in zip(SPLITS, weights, strict=True)}


def assign_split(content_hash: bytes, weights: Mapping[Split, float], seed: int) -> Split:
    """The split of a document by a hash of its text: the same on any machine, in any order, for
    equal texts."""
    digest = hashlib.blake2b(content_hash, digest_size=8, key=str(seed).encode()).digest()
    position = int.from_bytes(digest, "little") / 2**64
    possible: list[Split] = [split for split in SPLITS if weights[split] > 0]
    for split in SPLITS:
        position -= weights[split]
        if position < 0:
            return split
    return possible[-1]


def load_split_list(url: str) -> dict[str, Split]:
    """Split by document id, from loose JSON lines {"id": ..., "split": ...}.

    Raises:
        FileNotFoundError: no such file.
        InputError: a line of another form, or an id in two splits.
    """
    listed: dict[str, Split] = {}
    for number, line in enumerate(read_bytes(url).splitlines(), start=1):
        if not line.strip():
            continue
        name, split = _list_entry(line, f"{url}, line {number}")
        if listed.setdefault(name, split) != split:
            raise InputError(f"{url}, line {number}: {name!r} is also in {listed[name]!r}")
    return listed


def _list_entry(line: bytes, place: str) -> tuple[str, Split]:
    try:
        entry: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise InputError(f"{place}: not JSON: {error.msg}") from None
    if not isinstance(entry, dict) or "id" not in entry or entry.get("split") not in SPLITS:
        raise InputError(
            f'{place}: expected {{"id": ..., "split": ...}} with one of the splits '
            f"{', '.join(SPLITS)}, found {line[:80].decode(errors='replace')}"
        )
    return str(entry["id"]), entry["split"]
