"""The demo's report: `report.json` for programs, `report.html` for people, a table for the
terminal.

Every row of the table comes with a sentence that is derived from its numbers, whatever they are.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from demo.facts import guess_entropy
from demo.plan import HELD_OUT_PLACES
from etl.dataset import Dataset
from etl.storage import StageFolder, StoredFile
from indexing.embeddings import dataset_tokenizer
from indexing.knn_manifest import open_map

MODES = ("on", "off", "random", "baseline", "longer")
_EXAMPLES = 3
_CURVES = (
    ("loss", "-", "training"),
    ("val_loss_off", "o--", "validation off"),
    ("val_loss_on", "s:", "validation on"),
)
_SPLITS = ("train", "validation", "test")
_NUMBERS = ("loss", "ppl", "bpb", "tokens", "before_first_retrieval", "after_first_retrieval")


def write_report(output_url: str, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Writes both files from the results of all stages, prints the table; returns the content of
    report.json."""
    root = Path(output_url).absolute()
    report = summarize(results)
    (root / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    page = _page(root, report, results)
    (root / "report.html").write_text(page, encoding="utf-8")
    print(_terminal_table(report), file=sys.stderr)
    print(f"\n{root / 'report.html'}", file=sys.stderr)
    return report


def summarize(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """report.json."""
    prepared, index = results["prepare"], results["index"]
    maps = [results[f"knn-{split}"] for split in _SPLITS]
    datasets = [prepared["datasets"][split] for split in ("retrieval", "validation", "test")]
    trained = results["train-retro"]
    report = {
        "corpus": {
            "documents": prepared["counts"]["documents"],
            "bytes": prepared["counts"]["text_bytes"],
            "tokens": sum(dataset["tokens"] for dataset in datasets),
            "chunks": sum(dataset["chunks"] for dataset in datasets),
            "skipped": prepared["skipped"],
        },
        "index": {
            "vectors": index["vectors"],
            "factory": index["factory"],
            "recall_at_k": index["recall"]["recall_at_k"],
            "k": index["recall"]["k"],
        },
        "knn": {
            "K": maps[0]["k"],
            "fill_rate": _weighted(maps, "fill_rate", "rows"),
        },
        "train": {
            name: trained[name] for name in ("steps", "tokens", "tokens_per_s", "world_size")
        },
        "eval": {row: _evaluation(row, results) for row in ("text", "facts")},
        "seconds": {
            stage: round(sum(r["seconds"] for name, r in results.items() if name.startswith(stage)))
            for stage in ("prepare", "index", "knn", "train", "evaluate")
        },
    }
    report["says"] = {"text": _text_sentence(report), "facts": _facts_sentence(report)}
    return report


def _weighted(maps: list[dict[str, Any]], value: str, weight: str) -> float:
    return sum(m[value] * m[weight] for m in maps) / max(1, sum(m[weight] for m in maps))


def _evaluation(row: str, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    retro = results[f"evaluate-retro-{row}"]
    found = {mode: retro[mode] for mode in ("on", "off", "random")}
    found["baseline"] = results[f"evaluate-plain-{row}"]["off"]
    if f"evaluate-longer-{row}" in results:
        found["longer"] = results[f"evaluate-longer-{row}"]["off"]
    evaluation: dict[str, Any] = {
        mode: {n: sums[n] for n in _NUMBERS} for mode, sums in found.items()
    }
    if row == "facts":
        tokens = evaluation["on"]["tokens"]
        evaluation["entropy"] = guess_entropy() * HELD_OUT_PLACES[1] / max(1, tokens)
    return evaluation


def _text_sentence(report: dict[str, Any]) -> str:
    text = report["eval"]["text"]
    on, off, random = (text[mode]["loss"] for mode in ("on", "off", "random"))
    effect = "lowers" if on < off else "raises"
    start = (
        f"On natural text retrieval {effect} the loss of the same frozen decoder by "
        f"{abs(on - off):.3f} nats a token; random neighbors give {random:.3f}. Minutes of "
        "training on a CPU are too few to expect more"
    )
    if "longer" not in text:
        return f"{start}, and a plain decoder given the same extra time would also improve."
    return (
        f"{start}: a plain decoder given the same extra time reaches {text['longer']['loss']:.3f}."
    )


def _facts_sentence(report: dict[str, Any]) -> str:
    facts = report["eval"]["facts"]
    on, off, random = (facts[mode]["loss"] for mode in ("on", "off", "random"))
    start = (
        f"Answers about invented places: {on:.2f} nats with retrieval, {off:.2f} without, "
        f"{random:.2f} with random neighbors; a guess costs {facts['entropy']:.2f}. "
    )
    if on < 0.8 * min(off, facts["entropy"]):
        return start + "No training document holds these answers: they come from the neighbors."
    return start + "Retrieval is hardly used yet: train longer (DEMO_MINUTES)."


def _skipped_sentence(report: dict[str, Any]) -> str:
    """What preparation left out and why; "" if nothing."""
    reasons = [f"{count} ({reason})" for reason, count in report["corpus"]["skipped"].items()]
    return f"Records that could not be used: {', '.join(reasons)}." if reasons else ""


def _modes(report: dict[str, Any]) -> list[str]:
    """The columns of the table: `longer` only if that decoder was trained."""
    return [mode for mode in MODES if mode in report["eval"]["text"]]


def _rows(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """(label, cells) of the results table; a cell is its text and whether it is the row's least
    loss."""
    rows = []
    for row, label in (("text", "natural text"), ("facts", "facts (answers)")):
        found = report["eval"][row]
        losses = [found[mode]["loss"] for mode in _modes(report)]
        cells = [(f"{loss:.3f}", loss == min(losses)) for loss in losses]
        guess = f"{found['entropy']:.3f}" if "entropy" in found else "–"
        rows.append((label, [*cells, (guess, False)]))
    return rows


def _terminal_table(report: dict[str, Any]) -> str:
    heads = [*_modes(report), "a guess"]
    lines = ["", "loss in nats a token   " + "".join(f"{head:>10}" for head in heads)]
    for label, cells in _rows(report):
        lines.append(f"{label:<23}" + "".join(f"{cell:>10}" for cell, _ in cells))
    said = [*report["says"].values(), _skipped_sentence(report)]
    return "\n".join([*lines, "", *filter(None, said)])


def _page(root: Path, report: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        skipped=_skipped_sentence(report),
        heads=[*_modes(report), "a guess"],
        rows=_rows(report),
        curves=_loss_curves(root),
        histogram=_similarities(results),
        examples=_examples(results),
        sample=results["generate"],
        commands=[(name, r["command"], r["seconds"]) for name, r in results.items()],
    )


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _loss_curves(root: Path) -> str:
    figure, axes = plt.subplots(figsize=(8.5, 3.6))
    labels = {"plain": "plain decoder", "retro": "retrieval parts", "longer": "plain, longer"}
    for color, (name, label) in enumerate(labels.items()):
        path = root / name / "metrics.jsonl"
        if not path.exists():
            continue
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for key, style, what in _CURVES:
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                steps, losses = zip(*points, strict=True)
                axes.plot(steps, losses, style, color=f"C{color}", label=f"{label}, {what}")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


def _similarities(results: dict[str, dict[str, Any]]) -> str:
    """Histogram of the similarity of each chunk of the test dataset to its best neighbor."""
    manifest = open_map(results["knn-test"]["map_url"]).manifest
    folder = StageFolder(results["knn-test"]["map_url"])
    scores = np.load(folder.fetch(StoredFile(**manifest["files"]["scores"])))
    best = scores[:, 0].astype(np.float32)
    figure, axes = plt.subplots(figsize=(8.5, 2.6))
    axes.hist(best[np.isfinite(best)], bins=50)
    axes.set(xlabel="cosine similarity to the best neighbor", ylabel="chunks")
    return _svg(figure)


def _examples(results: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """A few chunks of the test dataset, evenly spread, beside their best neighbor."""
    datasets = results["prepare"]["datasets"]
    test, retrieval = Dataset(datasets["test"]["url"]), Dataset(datasets["retrieval"]["url"])
    tokenizer = dataset_tokenizer(retrieval)
    firsts = test.document_first_chunk[:-1]
    chosen = firsts[np.linspace(0, len(firsts) - 1, _EXAMPLES).astype(int)]
    best = open_map(results["knn-test"]["map_url"]).load().get(chosen)[:, 0]
    chunks = tokenizer.decode_batch(test.get_chunk(chosen, continuation=False))
    neighbors = tokenizer.decode_batch(retrieval.get_chunk(np.maximum(best, 0)))
    return [
        {"chunk": chunk, "neighbor": neighbor if i >= 0 else "(none)"}
        for chunk, neighbor, i in zip(chunks, neighbors, best, strict=True)
    ]
