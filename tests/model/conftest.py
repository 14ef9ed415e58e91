"""A small dataset with its retrieval dataset and a KNN map of chosen neighbors, without any engine."""

from dataclasses import asdict, dataclass

import numpy as np
import pytest

from etl.dataset import Dataset
from etl.storage import StageFolder
from indexing.knn_map import write_knn_map
from indexing.knn_manifest import NAME, BuiltMap, open_map
from tests.indexing.conftest import prepare_plainly


@dataclass(frozen=True)
class Data:
    training: Dataset
    retrieval: Dataset
    map: BuiltMap


@pytest.fixture(scope="session")
def data(tokenizer_url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    training, retrieval = prepare_plainly(folder, tokenizer_url)
    return Data(training, retrieval, chosen_map(folder, training, retrieval))


def chosen_map(folder, training, retrieval):
    """Four neighbors a chunk: pseudo-random chunks, the last one missing."""
    ids = np.random.default_rng(0).integers(0, retrieval.num_chunks, (training.num_chunks, 4))
    ids[:, 3] = -1
    stage = StageFolder(str(folder / "map"))
    path = folder / "map.knn"
    with open(path, "wb") as file:
        write_knn_map(file, ids)
    [stored] = stage.store("map", path)
    value = {
        "files": {"map": asdict(stored)},
        "training_fingerprint": training.manifest.fingerprint,
        "retrieval_fingerprint": retrieval.manifest.fingerprint,
        "k": 4,
    }
    stage.publish(NAME.removesuffix(".json"), value)
    return open_map(stage.url)
