"""The manifest of a finished KNN map: its file and the fingerprints of what it connects. Storage
only.

The trainer opens a map through it, so a map never meets datasets that it was not made for.
"""

from dataclasses import dataclass
from typing import Any

from etl.dataset import Dataset
from etl.storage import StageFolder, StorageError, StoredFile, join_url, read_json
from indexing.knn_map import KNNMap

NAME = "knn.json"


@dataclass(frozen=True)
class BuiltMap:
    """A finished KNN map folder."""

    url: str
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["files"]["map"]["sha256"])[:32]

    def load(self) -> KNNMap:
        return KNNMap(StageFolder(self.url).fetch(StoredFile(**self.manifest["files"]["map"])))

    def check_parents(self, training: Dataset, retrieval: Dataset) -> None:
        """Refuses datasets other than those the map was made from.

        Raises:
            StorageError: with both fingerprints named.
        """
        for name, dataset in (("training", training), ("retrieval", retrieval)):
            expected, found = self.manifest[f"{name}_fingerprint"], dataset.manifest.fingerprint
            if expected != found:
                raise StorageError(
                    f"{self.url} was made for the {name} dataset {expected}, but {dataset.url} is "
                    f"{found}; "
                    "build the map again for these datasets, or name the ones it was made for"
                )


def open_map(url: str) -> BuiltMap:
    """The finished map in a folder.

    Raises:
        FileNotFoundError: the merge stage did not finish there.
    """
    try:
        return BuiltMap(url, read_json(join_url(url, NAME)))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{url}: no {NAME}; expected the folder that jobs.build_knn_map prints"
        ) from None
