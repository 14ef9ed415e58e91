"""The report on an index for people: `indexing/quality.py`'s numbers as sentences, tables and
figures. A pure function of the report's JSON."""

from typing import Any

from indexing.html_page import Section, html_page, percent
from indexing.quality_figures import degree_figure, density_figure, recall_figure, share_figure
from indexing.quality_rows import ORIGINS

_SHOWN_QUANTILES = ("0", "0.01", "0.05", "0.5", "0.95", "0.99", "1")


def quality_page(report: dict[str, Any]) -> str:
    """The page of a report."""
    sections = [
        Section("What stands out", "\n\n".join(report["findings"])),
        _recall(report),
        _scores(report),
        _hubs(report),
        Section("Chunks that are neighbors most often", "", *_top(report["hubness"]["top"])),
        _affinity(report),
        _lists(report),
        _chunks(report["chunks"]),
        _norms(report["norms"]),
    ]
    if report["leaks"] is not None:
        sections.append(_leaks(report["leaks"]))
    sections.append(_inputs(report))
    return html_page("Check of an index", sections)


def _inputs(report: dict[str, Any]) -> Section:
    rows = [(name.replace("_", " "), str(value)) for name, value in report["inputs"].items()]
    options = ", ".join(f"{name} {value}" for name, value in report["options"].items())
    rows.append(("options", options))
    return Section("What was judged", "", None, rows)


def _recall(report: dict[str, Any]) -> Section:
    recall, own = report["recall"], report["self_search"]
    text = (
        f"recall@{recall['k']} is the share of the {recall['k']} exactly nearest other chunks that "
        "the index finds; ties count. A chunk finds itself if no other is ahead of it; missed: the "
        "index did not reach it; outscored: another vector has a higher inner product with it."
    )
    low, high = own["low_95"], own["high_95"]
    half = recall["half_width_95"]
    rows = [
        (
            f"recall@{recall['k']}",
            f"{recall['recall_at_k']:.4f}",
            f"± {half:.4f}",
            recall["queries"],
        ),
        ("finds itself first", f"{own['share']:.4f}", f"{low:.4f} – {high:.4f}", own["queries"]),
        ("missed", f"{own['missed']:,}", None, own["queries"]),
        ("outscored", f"{own['outscored']:,}", None, own["queries"]),
    ]
    columns = ("", "value", "95% interval", "queries")
    return Section("Recall", text, columns, rows, recall_figure(report["recall_by_nprobe"]))


_SCORES = {
    "first": "first neighbor",
    "kth": "K-th neighbor",
    "random": "random pair",
    "map_first": "first neighbor in the map",
    "map_kth": "last neighbor in the map",
}


def _scores(report: dict[str, Any]) -> Section:
    scores = report["scores"]
    found = {name: scores[name] for name in _SCORES if scores.get(name, {}).get("count")}
    rows = [(_SCORES[name], *_quantiles(values)) for name, values in found.items()]
    text = (
        f"Inner products of stored vectors; neighbors are of other documents, K is {scores['k']}. "
        "Neighbors that score like random pairs carry no information."
    )
    shown = {_SCORES[name]: found[name] for name in ("first", "kth", "random") if name in found}
    figure = density_figure(shown, "inner product (cosine for unit vectors)") if shown else None
    return Section("Scores", text, ("", "sample", *_quantile_names()), rows, figure)


def _quantile_names() -> list[str]:
    names = {"0": "least", "0.5": "median", "1": "greatest"}
    return [names.get(q, f"{float(q):.0%}") for q in _SHOWN_QUANTILES]


def _quantiles(values: dict[str, Any]) -> list[Any]:
    return [values["count"], *(values["quantiles"][q] for q in _SHOWN_QUANTILES)]


def _hubs(report: dict[str, Any]) -> Section:
    hubs, lists = report["hubness"], report["lists"]
    origin = "the map" if lists["from"] == "map" else "searches with chunks of the index"
    text = (
        f"In {lists['rows']:,} neighbor lists of {lists['k']} from {origin} "
        f"({lists['chunks']:,} chunks could have one). "
        "The in-degree of a chunk is how many of them it is in. Shares and skewness depend on the "
        "number of lists: compare reports with the same."
    )
    if lists["from"] == "search" and lists["rows"] + lists["rows_without_text"] < lists["chunks"]:
        text += " Only a sample of the chunks was searched, so most are nobody's neighbor here."
    rows = [
        ("indexed chunks", hubs["candidates"]),
        ("neighbor slots", hubs["slots"]),
        ("mean in-degree", hubs["mean"]),
        ("greatest in-degree", hubs["most"]),
        ("skewness of in-degree", hubs["skewness"]),
        ("nobody's neighbor", percent(hubs["never_retrieved"])),
        ("slots taken by the top 1 %", percent(hubs["top_percent_share"])),
    ]
    return Section("Hubs", text, None, rows, degree_figure(hubs["by_power_of_two"]))


def _top(hubs: list[dict[str, Any]]) -> tuple[list[str], list[Any]]:
    rows = [(str(hub["chunk"]), hub["times"], hub["source"], hub["text"]) for hub in hubs]
    return ["chunk", "times", "source", "text"], rows


def _affinity(report: dict[str, Any]) -> Section:
    affinity, lists = report["affinity"], report["lists"]
    names = {"all": "all slots", "expected": "expected of random neighbors"} | {
        key: f"overlap of {key.removeprefix('run_')} tokens or more"
        for key in affinity
        if key.startswith("run_")
    }
    order = ["expected", "all", *[key for key in names if key.startswith("run_")]]
    rows = [
        (names[key], affinity[key].get("slots"), *(percent(affinity[key][o]) for o in ORIGINS))
        for key in order
    ]
    text = (
        "Share of neighbor slots whose neighbor comes from the same file, folder or package (first "
        "folder) as the chunk, by the field src of their records, else by input file. Overlap is "
        "the longest run of tokens that a chunk shares with a neighbor and its continuation, "
        f"measured in {lists['measured']:,} sampled slots."
    )
    same = [f"same {origin}" for origin in ORIGINS]
    shares = {names[key]: [affinity[key][origin] for origin in ORIGINS] for key in order}
    columns = ("", "slots", *same)
    return Section("Where neighbors come from", text, columns, rows, share_figure(same, shares))


def _lists(report: dict[str, Any]) -> Section:
    lists = report["lists"]
    rows = [
        ("lists of chunks with text", lists["rows"]),
        ("chunks without text (no list)", lists["rows_without_text"]),
        ("slots filled", percent(lists["fill_rate"])),
        (f"lists with fewer than {lists['k']}", lists["short"]),
        ("lists without any neighbor", lists["without"]),
    ]
    return Section("How full neighbor lists are", "", None, rows)


def _chunks(chunks: dict[str, Any]) -> Section:
    rows = [
        ("chunks", chunks["chunks"]),
        ("of these, to be indexed", chunks["indexed"]),
        ("vectors in the index", chunks["vectors"]),
        ("all pads", chunks["all_pads"]),
        ("without text: all pads, or special tokens only", chunks["without_text"]),
        (f"with fewer than {chunks['few_tokens']} tokens", chunks["with_few_tokens"]),
        ("mean tokens", chunks["mean_tokens"]),
    ]
    for name, equal in chunks["equal"].items():
        said = (
            f"{equal['chunks']:,} in {equal['groups']:,} groups, the largest of {equal['largest']}"
        )
        rows.append((f"chunks with equal {name}", said if equal["groups"] else "none"))
    return Section("Chunks", "", None, rows)


def _norms(norms: dict[str, Any]) -> Section:
    rows: list[tuple[str, Any]] = [
        ("zero", norms["zero"]),
        ("zero, though the chunk has text (white space has no vector)", norms["zero_with_text"]),
        ("not finite", norms["not_finite"]),
        ("length not 1 (by more than 0.002)", norms["not_unit"]),
    ]
    if not norms["count"]:
        return Section("Lengths of vectors", "", None, rows)
    quantiles = zip(("sample", *_quantile_names()), _quantiles(norms), strict=True)
    rows += [(name, value if name == "sample" else f"{value:.5f}") for name, value in quantiles]
    figure = density_figure({"length": norms}, "length of the stored fp16 vector")
    return Section("Lengths of vectors", "", None, rows, figure)


def _leaks(leaks: dict[str, Any]) -> Section:
    examples = leaks["examples"]
    rows = [
        (
            kind.replace("_", " "),
            count,
            "allowed by the map" if kind in leaks["permitted"] else "",
            _example(examples.get(kind)),
        )
        for kind, count in leaks["counts"].items()
    ]
    text = f"All {leaks['neighbors']:,} neighbors of {leaks['chunks']:,} chunks were looked at."
    return Section("Leaks", text, ("kind", "slots", "", "first"), rows)


def _example(leak: dict[str, Any] | None) -> str:
    if leak is None:
        return ""
    return (
        f"neighbor {leak['neighbor_id']} ({leak['neighbor_place']}) of chunk {leak['chunk_id']} "
        f"({leak['chunk_place']})"
    )
