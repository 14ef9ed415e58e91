"""quality | `python -m jobs.check_index` | Dask dataframes (pandas or cuDF) | reads an index, its
retrieval dataset, optionally a KNN map and its dataset | writes report.json and report.html:
recall, scores, hubs, where neighbors come from, equal chunks, vectors, leaks.
"""

import logging
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any

from etl.dataset import Dataset
from etl.storage import (
    StageFolder,
    StorageError,
    StoredFile,
    content_key,
    join_url,
    scratch_folder,
    write_atomically,
)
from indexing.built_index import BuiltIndex, open_index
from indexing.knn_manifest import BuiltMap, open_map
from indexing.leaks import Leak, LeakCounts, scan_map
from indexing.quality_search import Judged, QualityOptions
from indexing.quality_tables import check_backend
from jobs.command_line import run_job

log = logging.getLogger(__name__)
VERSION = 1
RECORD, PAGE = "report", "report.html"


@dataclass(frozen=True)
class CheckIndexConfig:
    """What an engineer needs to know to trust a Faiss index, and a KNN map of it.

    Attributes:
        index_url: Folder of the index, as jobs.build_index prints it.
        retrieval_url: Folder of the retrieval dataset that was indexed.
        output_url: Folder for reports; each has a folder check-KEY of its own inside.
        dataset_url: Folder of the dataset that the map belongs to; only with map_url.
        map_url: Folder of a KNN map, as jobs.build_knn_map prints it: hubs, origins and fill rate
            are those of its rows, and all its neighbors are scanned for leaks. A map that leaks
            gets its report, then the job fails with exit code 2, as for any bad input.
        measure: How much is measured.
        device: Where vectors are searched: cpu or a CUDA device.
    """

    index_url: str
    retrieval_url: str
    output_url: str
    dataset_url: str | None = None
    map_url: str | None = None
    measure: QualityOptions = field(default_factory=QualityOptions)
    device: str = "cpu"


def run(config: CheckIndexConfig) -> dict[str, Any]:
    check_backend(config.measure.backend)
    judged = _open(config)
    folder = StageFolder(join_url(config.output_url, f"check-{_key(judged)}"))
    report = folder.record(RECORD)
    if report is None:
        report = _publish(folder, judged)
    else:
        log.info("%s is there already", folder.path_of(PAGE))
    for sentence in report["findings"]:
        log.info("%s", sentence)
    log.info("report: %s", folder.path_of(PAGE))
    if report["leaks"] is not None:
        _leak_counts(report["leaks"]).check()
    return {"report_url": folder.url, **_shortened(report)}


def _open(config: CheckIndexConfig) -> Judged:
    if (config.dataset_url is None) != (config.map_url is None):
        raise ValueError("dataset_url and map_url belong together: give both or neither")
    index, retrieval = open_index(config.index_url), Dataset(config.retrieval_url)
    expected, found = index.manifest["dataset_fingerprint"], retrieval.manifest.fingerprint
    if expected != found:
        raise StorageError(
            f"{index.url} was built from the dataset {expected}, but {retrieval.url} is {found}; "
            "name the retrieval dataset that was indexed"
        )
    training = built = None
    if config.map_url is not None and config.dataset_url is not None:
        training, built = Dataset(config.dataset_url), open_map(config.map_url)
        built.check_parents(training, retrieval)
        _check_map_of(built, index)
    return Judged(index, retrieval, training, built, config.device, config.measure)


def _check_map_of(built: BuiltMap, index: BuiltIndex) -> None:
    expected = built.manifest.get("index_fingerprint", index.fingerprint)
    if expected != index.fingerprint:
        raise StorageError(
            f"{built.url} was searched in the index {expected}, but {index.url} is "
            f"{index.fingerprint}; name the index that the map was built with"
        )


def _key(judged: Judged) -> str:
    built = judged.map and judged.map.fingerprint
    return content_key(
        VERSION,
        judged.index.fingerprint,
        judged.index.manifest["dataset_fingerprint"],
        judged.training and judged.training.manifest.fingerprint,
        built,
        judged.options,
    )[:16]


def _publish(folder: StageFolder, judged: Judged) -> dict[str, Any]:
    """Measures; the page is stored first, then the record that says the check is finished."""
    from indexing.quality import measure
    from indexing.quality_findings import findings
    from indexing.quality_page import quality_page

    leaks = None
    if judged.map is not None and judged.training is not None:
        leaks = scan_map(judged.training, judged.retrieval, judged.map).json
    with scratch_folder(folder.url) as scratch:
        report = {
            "version": VERSION,
            "inputs": _inputs(judged),
            "options": asdict(judged.options),
            **measure(judged, scratch),
            "leaks": leaks,
        }
    report["findings"] = findings(report)
    page = quality_page(report).encode()
    write_atomically(folder.path_of(PAGE), lambda file: file.write(page))
    stored = StoredFile(PAGE, len(page), sha256(page).hexdigest())
    folder.remove_scratch()
    return folder.publish(RECORD, report | {"files": {"page": asdict(stored)}})


def _inputs(judged: Judged) -> dict[str, Any]:
    manifest = judged.index.manifest
    named = {
        "index": judged.index,
        "retrieval": judged.retrieval,
        "dataset": judged.training,
        "map": judged.map,
    }
    return {
        **{f"{name}_url": each.url for name, each in named.items() if each is not None},
        "index_fingerprint": judged.index.fingerprint,
        "factory": manifest["factory"],
        "metric": manifest["metric"],
        "nprobe": judged.options.nprobe or manifest["nprobe"],
        "vectors": manifest["vectors"],
        "embedder": manifest["embedder"]["name"],
    }


def _leak_counts(leaks: dict[str, Any]) -> LeakCounts:
    """The counts as the scan gave them, from a report."""
    examples = {kind: Leak(**leak) for kind, leak in leaks["examples"].items()}
    plain = {name: value for name, value in leaks.items() if name != "total"}
    return LeakCounts(**plain | {"examples": examples, "permitted": tuple(leaks["permitted"])})


def _shortened(report: dict[str, Any]) -> dict[str, Any]:
    """The report's main numbers."""
    hubs, affinity, scores = report["hubness"], report["affinity"], report["scores"]
    names = ("skewness", "never_retrieved", "top_percent_share", "most")
    return {
        "recall": report["recall"],
        "self_recall": report["self_search"]["share"],
        "median_scores": {
            name: scores[name]["quantiles"]["0.5"]
            for name in ("first", "kth", "random")
            if scores[name]["count"]
        },
        "hubness": {name: hubs[name] for name in names},
        "affinity": {name: affinity[name] for name in ("all", "expected")},
        "fill_rate": report["lists"]["fill_rate"],
        "equal_chunks": report["chunks"]["equal"]["tokens"]["chunks"],
        "not_unit": report["norms"]["not_unit"],
        "leaks": report["leaks"] and report["leaks"]["total"],
        "findings": report["findings"],
    }


if __name__ == "__main__":
    run_job("Judge an index, and a KNN map of it.", CheckIndexConfig, run)
