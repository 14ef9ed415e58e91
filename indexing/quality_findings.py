"""What an engineer should know first about an index: `indexing/quality.py`'s report as sentences. A
sentence appears where its numbers call for it; thresholds are here alone."""

from collections.abc import Callable
from typing import Any

from indexing.html_page import percent
from indexing.quality_rows import ORIGINS

Finding = Callable[[dict[str, Any]], str | None]


def findings(report: dict[str, Any]) -> list[str]:
    """Sentences about what an engineer should know first, problems before the rest."""
    found = [sentence for rule in _RULES if (sentence := rule(report)) is not None]
    return found or ["Nothing unusual was found."]


def _says_leaks(report: dict[str, Any]) -> str | None:
    leaks = report["leaks"]
    if leaks is None or not leaks["total"]:
        return None
    return f"The map leaks: {leaks['total']:,} neighbors that their chunk may not have."


def _says_norms(report: dict[str, Any]) -> str | None:
    norms = report["norms"]
    if not (norms["not_unit"] or norms["not_finite"]):
        return None
    return (
        f"Vectors are not all of unit length: {norms['not_unit']:,} have another, "
        f"{norms['not_finite']:,} are not finite. Long vectors outscore nearer ones; embed again."
    )


def _says_recall(report: dict[str, Any]) -> str | None:
    recall, own = report["recall"], report["self_search"]
    if recall["recall_at_k"] >= 0.95 and own["share"] >= 0.99:
        return None
    return (
        f"The index misses neighbors: recall@{recall['k']} is {recall['recall_at_k']:.3f}, and "
        f"{percent(own['share'])} of the chunks find themselves. Visit more lists (nprobe) or "
        "store more bits."
    )


def _says_hubs(report: dict[str, Any]) -> str | None:
    hubs = report["hubness"]
    if hubs["top_percent_share"] < 0.2:
        return None
    return (
        f"Few chunks take many places: the top 1 % are in {percent(hubs['top_percent_share'])} of "
        "the neighbor slots; look at their text below, boilerplate may be taken out."
    )


def _says_equal(report: dict[str, Any]) -> str | None:
    chunks = report["chunks"]
    surplus = chunks["equal"]["tokens"]["surplus"]
    if surplus < 0.01 * chunks["chunks"]:
        return None
    return (
        f"{percent(surplus / chunks['chunks'])} of the chunks repeat another one's tokens: they "
        "fill neighbor lists with copies."
    )


def _says_affinity(report: dict[str, Any]) -> str | None:
    affinity = report["affinity"]
    real, chance = affinity["all"], affinity["expected"]
    high = [o for o in ORIGINS if real[o] >= 0.1 and real[o] >= min(2 * chance[o], chance[o] + 0.1)]
    if not high:
        return None
    parts = [
        f"{percent(real[o])} from the same {o} (random neighbors: {percent(chance[o])})"
        for o in high
    ]
    return (
        f"Neighbors stay near home: {', '.join(parts)}. A split by document then flatters "
        f"retrieval, because held-out text has neighbors from its own {high[-1]}; hold out whole "
        f"{high[-1]}s to see what retrieval brings on new sources."
    )


def _says_overlap(report: dict[str, Any]) -> str | None:
    longest = max((key for key in report["affinity"] if key.startswith("run_")), key=_run)
    share = report["affinity"][longest]["slots"] / max(1, report["lists"]["measured"])
    if share < 0.05:
        return None
    return (
        f"{percent(share)} of the neighbors share {_run(longest)} tokens in a row with their "
        "chunk: part of what retrieval gains is copied text."
    )


def _run(key: str) -> int:
    return int(key.removeprefix("run_"))


def _says_fill(report: dict[str, Any]) -> str | None:
    lists = report["lists"]
    if lists["fill_rate"] >= 0.99:
        return None
    return (
        f"Only {percent(lists['fill_rate'])} of the neighbor slots are filled; "
        f"{lists['without']:,} chunks with text have no neighbor."
    )


_RULES: tuple[Finding, ...] = (
    _says_leaks,
    _says_norms,
    _says_recall,
    _says_fill,
    _says_affinity,
    _says_overlap,
    _says_hubs,
    _says_equal,
)
