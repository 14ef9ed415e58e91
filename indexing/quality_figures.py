"""Figures of the report on an index, from the values of its JSON; without pyplot, so without state
or display."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GRAY, BROWN = "#2563a8", "#d97706", "#8a94a3", "#b04a16"


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def recall_figure(curve: Sequence[dict[str, Any]]) -> Figure | None:
    """Recall against visited lists with its intervals; None for fewer than two points."""
    if len(curve) < 2:
        return None
    figure, axes = _figure()
    visited = [point["nprobe"] for point in curve]
    recalls = [point["recall_at_k"] for point in curve]
    half_widths = [point["half_width_95"] for point in curve]
    axes.errorbar(visited, recalls, half_widths, marker="o", color=BLUE, capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(visited, [str(n) for n in visited])
    axes.set(xlabel="nprobe (inverted lists visited by a query)", ylabel=f"recall@{curve[0]['k']}")
    axes.grid(alpha=0.3)
    return figure


def density_figure(found: Mapping[str, dict[str, Any]], xlabel: str) -> Figure:
    """Histograms by name as densities, so that those with other bins compare."""
    figure, axes = _figure()
    for color, (name, values) in zip((BLUE, ORANGE, GRAY), found.items(), strict=False):
        edges, counts = values["histogram"]["edges"], values["histogram"]["counts"]
        width = edges[1] - edges[0]
        heights = [count / sum(counts) / width for count in counts]
        axes.stairs(heights, edges, fill=True, alpha=0.45, color=color, label=name)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.set(xlabel=xlabel, ylabel="density")
    if len(found) > 1:
        axes.legend(frameon=False)
    return figure


def degree_figure(bins: Sequence[Sequence[int]]) -> Figure:
    """Chunks by in-degree; both axes logarithmic: bins (first, last, chunks) double."""
    figure, axes = _figure()
    labels = [str(first) if first == last else f"{first}–{last}" for first, last, _ in bins]
    axes.bar(range(len(bins)), [chunks for *_, chunks in bins], color=BLUE, width=0.85)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.set_xticks(range(len(bins)), labels, rotation=30, ha="right")
    axes.set(xlabel="in-degree (lists that a chunk is in; doubling bins)", ylabel="chunks")
    return figure


def share_figure(groups: Sequence[str], shares: Mapping[str, Sequence[float]]) -> Figure:
    """Bars of shares [groups], a color for each name."""
    figure, axes = _figure()
    for number, (color, name) in enumerate(zip((GRAY, BLUE, ORANGE, BROWN), shares, strict=False)):
        places = [i + 0.2 * (number - (len(shares) - 1) / 2) for i in range(len(groups))]
        axes.bar(places, [100 * share for share in shares[name]], 0.19, color=color, label=name)
    axes.set_xticks(range(len(groups)), groups)
    axes.set(ylabel="neighbor slots (%)")
    axes.legend(frameon=False, fontsize="small")
    return figure
