"""What an evaluation found, in sentences, tables and plots. Every sentence is derived from the
numbers, whatever they are; what was not measured is named.

matplotlib is imported by the plots alone.
"""

from typing import TYPE_CHECKING, Any

from indexing.html_page import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINES = {
    "equal_step_decoder": "equal_step_url",
    "equal_time_decoder": "equal_time_url",
}
"""Plain decoders to compare with, and the options that name their runs."""

_CURVES = ("off", "on", "random", "oracle", *BASELINES)
_TITLES = {
    "seen": "Overlap of a chunk with its nearest chunks of the database",
    "in_sight": "Overlap of a chunk with the neighbors its tokens can attend to",
}


def conditions_of(result: dict[str, Any]) -> list[str]:
    """Names of the conditions and baselines of a result, in its order."""
    return [n for n, found in result.items() if isinstance(found, dict) and "ppl" in found]


def sentences(result: dict[str, Any]) -> list[str]:
    """What the numbers say, and what they cannot."""
    said = []
    if "on" in result and "off" in result:
        said += [*_effect(result), *_controls(result), *_sources_of_gain(result)]
    for name in ("random", *BASELINES):
        if "difference_of_on" in result.get(name, {}):
            said.append(_against(name, result[name]))
    if result["missing"]:
        options = " and ".join(BASELINES[name] for name in result["missing"])
        said.append(
            f"No run was named in {options}: on against off alone misleads, because off may suffer "
            "from the training with retrieval. Whether retrieval is worth its cost is not shown."
        )
    for name, share in result["short_rows"].items():
        if share > 0.01:
            said.append(
                f"{name} is not exact: for {100 * share:.0f}% of the chunks the map's rows run out "
                "before the neighbors are complete; build it with more neighbors."
            )
    for name, why in result["not_measured"].items():
        said.append(f"{name} was not measured: {why}.")
    return said


def _interval(difference: dict[str, Any]) -> str:
    if difference["low"] is None:
        return "one document, no interval"
    return f"95% interval {difference['low']:+.4f} to {difference['high']:+.4f}"


def _verdict(difference: dict[str, Any], what: str) -> str:
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    if low is None or low <= 0 <= high:
        return f"{what} changes the loss by {mean:+.4f} nats a token, which may be chance"
    effect = "lowers" if mean < 0 else "raises"
    return f"{what} {effect} the loss by {abs(mean):.4f} nats a token"


def _effect(result: dict[str, Any]) -> list[str]:
    difference = result["on"]["difference_from_off"]
    ratio = result["on"]["ppl"] / result["off"]["ppl"] - 1
    return [
        f"{_verdict(difference, 'Retrieval')} ({_interval(difference)}, over "
        f"{difference['documents']} documents); perplexity {100 * ratio:+.1f}%."
    ]


def _controls(result: dict[str, Any]) -> list[str]:
    said = []
    for name in ("random", "shuffled"):
        if name in result:
            difference = result[name]["difference_from_off"]
            text = _verdict(difference, f"The control with {name} neighbors")
            is_better = difference["high"] is not None and difference["high"] < 0
            worry = "; that much of the gain needs no retrieved text" if is_better else ""
            said.append(f"{text} ({_interval(difference)}){worry}.")
    if "oracle" in result:
        difference = result["oracle"]["difference_from_off"]
        is_best = result["oracle"]["loss"] < result["on"]["loss"]
        worry = "" if is_best else "; the model does not use what it is shown"
        said.append(
            f"{_verdict(difference, 'The control with the true continuation as a neighbor')} "
            f"({_interval(difference)}){worry}."
        )
    return said


def _sources_of_gain(result: dict[str, Any]) -> list[str]:
    if "overlap" not in result:
        return []
    said = []
    for kind, where in (
        ("in_sight", "with a neighbor in sight"),
        ("seen", "with one of the nearest chunks of the database"),
    ):
        long = result["overlap"][kind]["long"]
        if long["share_of_gain"] is not None:
            said.append(
                f"Chunks that share {long['least_tokens']} or more consecutive tokens {where} hold "
                f"{100 * long['share_of_tokens']:.0f}% of the tokens and "
                f"{100 * long['share_of_gain']:.0f}% of the difference between on and off."
            )
    return said


def _against(name: str, found: dict[str, Any]) -> str:
    difference = found["difference_of_on"]
    what = "random neighbors" if name == "random" else f"the {name.replace('_', ' ')}"
    text = _verdict(difference, f"Against {what}, retrieval")
    return f"{text} ({_interval(difference)})."


def report_sections(result: dict[str, Any]) -> list[Section]:
    """Of the page."""
    facts = [
        [name, result[name]]
        for name in ("run_url", "dataset_url", "parameters", "samples", "seq_length", "stride")
    ]
    sections = [
        Section("What the numbers say", "\n\n".join(result["says"])),
        Section(
            "Losses",
            "Token-weighted, in nats a token; bits a byte by the bytes of the text as it was "
            "prepared. Differences are of losses on the same tokens, with 95% intervals of a "
            "paired bootstrap over documents; below zero is better than off.",
            ["condition", "loss", "perplexity", "bits a byte", "against off", "from", "to"],
            [_row(name, result[name]) for name in conditions_of(result)],
        ),
        Section(
            "Before and after the first retrieval",
            "No neighbor can be seen before the first chunk of a document is complete.",
            ["condition", "loss before", "tokens before", "loss after", "tokens after"],
            [_before_and_after(name, result[name]) for name in conditions_of(result)],
        ),
    ]
    if "overlap" in result:
        sections += [_overlap_section(result["overlap"], kind) for kind in _TITLES]
    if result["leaks"] is not None:
        sections.append(_leak_section(result["leaks"]))
    return [*sections, Section("What was evaluated", "", None, facts)]


def _row(name: str, found: dict[str, Any]) -> list[Any]:
    difference = found.get("difference_from_off", {})
    values = [difference.get(key) for key in ("mean", "low", "high")]
    return [name, found["loss"], found["ppl"], found["bpb"], *values]


def _before_and_after(name: str, found: dict[str, Any]) -> list[Any]:
    before, after = found["before_first_retrieval"], found["after_first_retrieval"]
    return [name, before["loss"], before["tokens"], after["loss"], after["tokens"]]


def _overlap_section(overlap: dict[str, Any], kind: str) -> Section:
    described = overlap[kind]
    rows = [
        [
            f"{b['first']} to {b['last']}" if b["first"] != b["last"] else str(b["first"]),
            b["chunks"],
            b["tokens"],
            b["mean_loss_a"],
            b["mean_loss_b"],
            b["share_of_tokens"],
            b["share_of_gain"],
        ]
        for b in described["buckets"]
    ]
    text = "Longest run of tokens in common, by chunk."
    if kind == "seen":
        text += (
            f" {overlap['neighbors_seen']} nearest chunks with their continuations were looked at. "
            "The curve is bits a byte over the chunks that share at most that part of their tokens "
            "(RETRO, section 2.6): what is left of a gain at the left end is no copying."
        )
    columns = ["tokens in common", "chunks", "tokens", "off", "on", "of tokens", "of the gain"]
    return Section(_TITLES[kind], text, columns, rows, _curve(described["bpb"]))


def _curve(curves: dict[str, list[dict[str, Any]]]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name in _CURVES:
        points = [p for p in curves.get(name, []) if p["bpb"] is not None]
        if points:
            alphas, values = [p["alpha"] for p in points], [p["bpb"] for p in points]
            axes.plot(alphas, values, "o-", label=name.replace("_", " "), markersize=4)
    axes.set(xlabel="share of a chunk in common, at most", ylabel="bits a byte")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _leak_section(leaks: dict[str, Any]) -> Section:
    rows = [[kind.replace("_", " "), count] for kind, count in leaks["counts"].items()]
    text = (
        f"{leaks['neighbors']:,} neighbors of {leaks['chunks']:,} chunks were looked at; any "
        "count above zero would have ended the evaluation."
    )
    return Section("Leaks in the KNN map", text, ["kind", "neighbors"], rows)
