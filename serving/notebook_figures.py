"""Figures about training runs and their evaluation for notebooks, from the lines of metrics.jsonl
(`model/metrics.py`) and the result of jobs.evaluate; without pyplot, so without state or display.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from model.evaluation_report import conditions_of

Lines = Sequence[Mapping[str, Any]]

_COLORS = ("#2563a8", "#d97706", "#3a8f5c", "#8a4fae", "#b04a16", "#5b6573")
_OFF, _ON, _PLAIN = _COLORS[0], _COLORS[1], _COLORS[5]
_SMOOTHED_SHARE = 0.05
_RATES = (
    ("lr", "learning rate", 1.0),
    ("grad_norm", "gradient norm before clipping", 1.0),
    ("tokens_per_s", "tokens a second, all ranks", 1.0),
    ("mfu", "MFU (%)", 100.0),
)


def series(lines: Lines, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps [N] and values [N] of a metric where it is known."""
    known = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    steps, values = zip(*known, strict=True) if known else ((), ())
    return np.asarray(steps, np.int64), np.asarray(values, np.float64)


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over the last twentieth of all values, of fewer at the start."""
    width = max(1, round(_SMOOTHED_SHARE * len(values)))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def loss_figure(runs: Mapping[str, Lines]) -> Figure:
    """Training loss of each run, faint and smoothed, with validation off and on, a panel a run."""
    figure, panels = _panels(len(runs), shared="y")
    for axes, (name, lines) in zip(panels, runs.items(), strict=True):
        steps, losses = series(lines, "loss")
        axes.plot(steps, losses, color=_PLAIN, alpha=0.25, linewidth=1)
        axes.plot(steps, smoothed(losses), color=_PLAIN, label="training, smoothed")
        for color, key, label in (
            (_OFF, "val_loss_off", "validation, retrieval off"),
            (_ON, "val_loss_on", "validation, retrieval on"),
        ):
            steps, losses = series(lines, key)
            if len(steps):
                axes.plot(steps, losses, "o-", color=color, label=label, markersize=4)
        axes.set(title=name, xlabel="step", ylabel="loss (nats a token)")
        axes.set_xlim(left=0)
        axes.legend(frameon=False)
    return figure


def gap_figure(runs: Mapping[str, Lines]) -> Figure | None:
    """Validation loss with retrieval off less that with it on; None if no run measured both."""
    gaps = {name: validation_gap(lines) for name, lines in runs.items()}
    gaps = {name: gap for name, gap in gaps.items() if len(gap[0])}
    if not gaps:
        return None
    figure, [axes] = _panels(1)
    for color, (name, (steps, values)) in zip(_COLORS, gaps.items(), strict=False):
        axes.plot(steps, values, "o-", color=color, label=name, markersize=4)
    axes.axhline(0, color="#1c2430", linewidth=0.8)
    axes.set(xlabel="step", ylabel="gain of retrieval (nats a token)")
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    return figure


def validation_gap(lines: Lines) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps [N] at which both were measured, and off less on [N]; above zero retrieval helps."""
    on = dict(zip(*series(lines, "val_loss_on"), strict=True))
    off = dict(zip(*series(lines, "val_loss_off"), strict=True))
    steps = sorted(on.keys() & off.keys())
    return np.asarray(steps, np.int64), np.asarray([off[s] - on[s] for s in steps])


def rates_figure(runs: Mapping[str, Lines]) -> Figure:
    """Learning rate, gradient norm, tokens a second and MFU of each run."""
    figure, panels = _panels(len(_RATES), columns=2)
    for axes, (key, label, scale) in zip(panels, _RATES, strict=True):
        for color, (name, lines) in zip(_COLORS, runs.items(), strict=False):
            steps, values = series(lines, key)
            axes.plot(steps, scale * values, color=color, label=name)
        axes.set(xlabel="step", ylabel=label)
        axes.set_xlim(left=0)
        if key == "grad_norm":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if not any(len(series(lines, key)[0]) for lines in runs.values()):
            axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center")
            axes.set(xticks=[], yticks=[])
    panels[0].legend(frameon=False)
    return figure


def forest_figure(result: Mapping[str, Any]) -> Figure | None:
    """Difference of each condition from retrieval off with its 95% interval, best first; None
    without a condition to compare."""
    found = [
        (name, result[name].get("difference_from_off")) for name in conditions_of(dict(result))
    ]
    rows = sorted(((n, d) for n, d in found if d), key=lambda row: row[1]["mean"], reverse=True)
    if not rows:
        return None
    figure, [axes] = _panels(1, height=1.2 + 0.38 * len(rows))
    for place, (name, difference) in enumerate(rows):
        mean, low, high = (difference[key] for key in ("mean", "low", "high"))
        color = _ON if name == "on" else _PLAIN
        if low is not None:
            axes.plot([low, high], [place, place], color=color, linewidth=2)
        axes.plot(mean, place, "o", color=color)
        axes.annotate(
            f"{mean:+.3f}", (mean, place), (0, 6), textcoords="offset points", ha="center"
        )
    axes.axvline(0, color="#1c2430", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name.replace("_", " ") for name, _ in rows])
    axes.set_ylim(-0.6, len(rows) - 0.2)
    axes.set(xlabel="loss less that of retrieval off (nats a token): left of zero is better")
    axes.grid(axis="y", visible=False)
    return figure


def gain_figure(overlap: Mapping[str, Any]) -> Figure:
    """Share of tokens and of the gain of retrieval by what a chunk has in common with neighbors:
    a panel for those it sees, and one for its nearest ones in the database."""
    figure, panels = _panels(2, shared="y")
    titles = {"in_sight": "with neighbors in sight", "seen": "with the nearest chunks"}
    for axes, (kind, title) in zip(panels, titles.items(), strict=True):
        buckets = overlap[kind]["buckets"]
        ranges = [(bucket["first"], bucket["last"]) for bucket in buckets]
        labels = [str(a) if a == b else f"{a}–{b}" for a, b in ranges]
        for shift, color, key, label in (
            (-0.2, _PLAIN, "share_of_tokens", "of the tokens"),
            (0.2, _ON, "share_of_gain", "of the gain"),
        ):
            places = [i + shift for i in range(len(buckets))]
            shares = [100 * (bucket[key] or 0) for bucket in buckets]
            axes.bar(places, shares, 0.38, color=color, label=label)
        axes.axhline(0, color="#1c2430", linewidth=0.8)
        axes.set_xticks(range(len(buckets)), labels, rotation=30, ha="right")
        axes.set(title=title, xlabel="tokens in a row in common", ylabel="share (%)")
        axes.grid(axis="x", visible=False)
    panels[0].legend(frameon=False)
    return figure


def last_values(lines: Lines) -> dict[str, float]:
    """Of each metric the last known value."""
    return {k: value for line in lines for k, value in line.items() if value is not None}


def _panels(
    count: int, columns: int | None = None, height: float = 3.6, shared: Any = False
) -> tuple[Figure, list[Axes]]:
    """Panels side by side, or in rows of `columns`."""
    columns = columns or count
    rows = -(-count // columns)
    figure = Figure(figsize=(max(6.4, 4.6 * columns), height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=shared == "y")
    panels = [axes for row in grid for axes in row]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, panels
