"""What the notebooks are made of, without a kernel: inputs, marks of common text, figures."""

import json

import numpy as np
import pytest

from etl.retmmap import Layout
from etl.tokenizer import load_tokenizer
from indexing.overlap import longest_common_runs
from model.retriever import Neighbor
from serving import notebook_figures as figures
from serving.chunk_rules import ChunkRules
from serving.notebook_inputs import NotebookError, index_inputs, metrics_of, training_inputs
from serving.notebook_search import answered, search_box
from serving.notebook_tables import common_run, marked_text, neighbor_table, text_table
from tests.notebooks.kernel import shown_text

PAD = 9
URLS = {"index_url": "i", "retrieval_url": "r", "dataset_url": "d", "map_url": "m"}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_url):
    return load_tokenizer(tokenizer_url)


def test_common_runs_are_as_long_as_those_that_are_measured():
    rng = np.random.default_rng(0)
    for alphabet in (3, 10, 40):
        left, right = rng.integers(0, alphabet, 64), rng.integers(0, alphabet, 128)
        found = common_run(left.tolist(), right.tolist(), PAD)
        masks = left[None] != PAD, right[None, None] != PAD
        expected = longest_common_runs(left[None], right[None, None], *masks)
        assert found.length == expected[0, 0]
        part = slice(found.start, found.start + found.length)
        other = slice(found.other_start, found.other_start + found.length)
        assert (left[part] == right[other]).all()
        assert PAD not in left[part]


def test_marked_text_is_the_text_whatever_is_marked(tokenizer):
    text = "<i>harbor</i> & Übermut 灯台 of the sea"
    ids = tokenizer.encode_batch([text])[0].ids.tolist()
    for start in range(len(ids)):
        for stop in range(start, len(ids) + 1):
            shown = marked_text(tokenizer, ids, range(start, stop), 10)
            assert shown_text(shown) == text
            assert "<i>" not in shown
            assert shown.count("<mark") == (0 if start == stop else shown.count("</mark>"))


def test_the_marked_part_is_the_run_and_the_continuation_is_told_apart(tokenizer):
    ids = tokenizer.encode_batch(["the harbor light of the old town"])[0].ids.tolist()
    shown = marked_text(tokenizer, ids, range(1, 3), len(ids) - 2)
    expected = tokenizer.decode_batch(np.asarray([ids[1:3]]))[0]
    assert shown.partition("</mark>")[0].endswith(f">{expected}")
    end = tokenizer.decode_batch(np.asarray([ids[-2:]]))[0]
    assert shown.endswith(f">{end}</span>")


def test_a_neighbor_without_much_in_common_is_not_marked(tokenizer):
    rules = ChunkRules(tokenizer, Layout.of(8, np.uint16, retrieval_db=True))
    own, same, other = (
        encoded.ids.tolist()
        for encoded in tokenizer.encode_batch(
            ["the harbor light turns slowly", "a harbor light turns slowly", "zzz"]
        )
    )
    found = [Neighbor(i, "map", "", f"<file {i}>", 0.5) for i in (3, 4)]
    shown = neighbor_table(rules, "title", own, found, [same, other])
    assert shown.count("<mark") == 2
    assert "&lt;file 3&gt;\nchunk 3" in shown
    assert shown.count("<tr>") == 4
    assert "no neighbor" in neighbor_table(rules, "title", own, [], [])


def test_tables_escape_and_round():
    shown = text_table(["<a>"], [["<b>"], [12345], [0.123456], [None]])
    assert "<b>" not in shown
    assert shown_text(shown) == "<a><b>12,3450.1235–"


def test_a_widget_shows_the_message_of_an_error():
    def fails(_):
        raise ValueError("nothing <here>")

    box = search_box(fails, "")
    box.children[0].children[0].value = "text"
    assert "nothing &lt;here&gt;" in box.children[1].value
    with pytest.raises(ZeroDivisionError):
        answered(lambda x: 1 // x, 0)


def stage_files(folder, results):
    (folder / "stages").mkdir()
    for name, result in results.items():
        (folder / "stages" / f"{name}.json").write_text(json.dumps(result))


def test_a_demo_tells_all_urls_and_evaluations(tmp_path):
    datasets = {name: {"url": name} for name in ("train", "test", "retrieval", "validation")}
    results = {
        "prepare": {"datasets": datasets},
        "index": {"index_url": "i"},
        "knn-train": {"map_url": "train map"},
        "knn-test": {"map_url": "test map"},
        "train-plain": {"run_url": "p"},
        "train-retro": {"run_url": "q"},
        "evaluate-retro-text": {"samples": 1},
        "evaluate-retro-facts": {"samples": 2},
        "generate": {"prompt": "Who?"},
    }
    stage_files(tmp_path, results)
    index = index_inputs(str(tmp_path))
    assert (index.dataset_url, index.map_url) == ("train", "train map")
    found = training_inputs(str(tmp_path))
    assert (found.dataset_url, found.map_url, found.run_url) == ("test", "test map", "q")
    assert found.evaluations == {"natural text": {"samples": 1}, "facts": {"samples": 2}}
    assert found.prompts == ("Who?",)
    (tmp_path / "stages" / "generate.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no finished demo.*generate.json.*make demo"):
        training_inputs(str(tmp_path))


@pytest.mark.parametrize("missing", ["index_url", "retrieval_url", "dataset_url", "map_url"])
def test_given_urls_are_never_completed_from_the_demo(missing, tmp_path):
    stage_files(tmp_path, {"prepare": {"datasets": {}}})
    urls = {name: url for name, url in URLS.items() if name != missing}
    with pytest.raises(NotebookError, match=f"{missing} (is )?None"):
        index_inputs(str(tmp_path), **urls)
    with pytest.raises(NotebookError, match=f"{missing} (is )?None"):
        training_inputs(str(tmp_path), ["run"], **urls)


def test_evaluations_are_read_and_names_must_differ(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps({"samples": name}))
    urls = [f"{tmp_path}/a", f"{tmp_path}/b/"]
    found = training_inputs("", ["x/run"], urls, **URLS)
    assert found.runs == {"run": "x/run"}
    assert found.evaluations == {"a": {"samples": "a"}, "b": {"samples": "b"}}
    with pytest.raises(NotebookError, match="different names"):
        training_inputs("", ["x/run", "y/run"], **URLS)
    with pytest.raises(FileNotFoundError, match=r"no report.json; expected the folder evaluation"):
        training_inputs("", ["x/run"], [f"{tmp_path}/c"], **URLS)


def test_a_run_without_metrics_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics.jsonl.*jobs.pretrain"):
        metrics_of({"run": str(tmp_path)})


LINES = [
    {"step": 1, "loss": 4.0, "mfu": None},
    {"step": 2, "loss": 2.0, "mfu": 0.5},
    {"step": 2, "val_loss_on": 2.5, "val_loss_off": 3.0},
    {"step": 3, "loss": None, "val_loss_on": 2.0},
]


def test_series_leave_out_what_is_not_known():
    steps, values = figures.series(LINES, "loss")
    assert (steps.tolist(), values.tolist()) == ([1, 2], [4.0, 2.0])
    assert len(figures.series(LINES, "lr")[0]) == 0
    steps, gains = figures.validation_gap(LINES)
    assert (steps.tolist(), gains.tolist()) == ([2], [0.5])
    assert figures.last_values(LINES) == {
        "step": 3,
        "loss": 2.0,
        "mfu": 0.5,
        "val_loss_on": 2.0,
        "val_loss_off": 3.0,
    }


def test_smoothing_is_a_mean_over_the_last_twentieth():
    values = np.random.default_rng(0).standard_normal(100)
    expected = [values[max(0, i - 4) : i + 1].mean() for i in range(100)]
    assert figures.smoothed(values) == pytest.approx(expected)
    assert len(figures.smoothed(values[:0])) == 0


def test_the_gap_is_drawn_where_both_losses_were_measured():
    assert figures.gap_figure({"run": LINES[:2]}) is None
    figure = figures.gap_figure({"plain": LINES[:2], "retro": LINES})
    assert figure is not None
    curve = figure.axes[0].lines[0]
    assert (curve.get_label(), list(np.asarray(curve.get_ydata()))) == ("retro", [0.5])


def test_the_forest_shows_each_interval_best_on_top():
    def condition(mean, width):
        low, high = (None, None) if width is None else (mean - width, mean + width)
        return {"ppl": 1.0, "difference_from_off": {"mean": mean, "low": low, "high": high}}

    result = {
        "off": {"ppl": 1.0},
        "random": condition(0.1, 0.2),
        "on": condition(-0.3, 0.1),
        "k=1": condition(0.0, None),
        "samples": 3,
    }
    figure = figures.forest_figure(result)
    assert figure is not None
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["random", "k=1", "on"]
    spans = [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert spans[:2] == [pytest.approx([-0.1, 0.3]), pytest.approx([-0.4, -0.2])]
    assert figures.forest_figure({"off": {"ppl": 1.0}}) is None


def test_rates_that_are_not_known_are_said_to_be():
    axes = figures.rates_figure({"run": LINES}).axes
    texts = [[text.get_text() for text in each.texts] for each in axes]
    assert texts == [["not known"], ["not known"], ["not known"], []]
    assert axes[3].lines[0].get_ydata() == pytest.approx([50.0])
