"""Memory of one worker: measured as the most anonymous memory of a process of its own, in which
mapped files do not count."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.indexing.made_up_vectors import made_up_vectors, store_embeddings

DIMENSION = 384
FIXED_BYTES = 600 << 20

WATCH = """
import json, sys, threading, time
from pathlib import Path
import faiss, numpy as np
from indexing import faiss_index
from indexing.embeddings import open_embeddings
from indexing.neighbors import NeighborFinder
from indexing.searchers import open_searcher

def anonymous():
    status = dict(l.split(":", 1) for l in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) << 10

peak, ended = [0], threading.Event()
def watch():
    while not ended.wait(0.002):
        peak[0] = max(peak[0], anonymous())
threading.Thread(target=watch, daemon=True).start()
url, path = sys.argv[1], Path(sys.argv[2])
embeddings = open_embeddings(url)
count = embeddings.num_chunks
"""
ADD = """
shard = count // int(sys.argv[3])
index = faiss_index.train_index("IVF64,SQ8", "inner_product", embeddings, count, 4000, 0)
before = anonymous()
faiss_index.add_rows(index, embeddings, 0, shard)
print(json.dumps(peak[0] - before))
for first in range(shard, count, 4000):
    faiss_index.add_rows(index, embeddings, first, min(first + 4000, count))
faiss_index.write_index(index, path)
"""
SEARCH = """
searcher = open_searcher(path, 8, "cpu")
keys = lambda ids: np.stack([ids, ids], axis=-1).astype(np.uint64)
finder = NeighborFinder(searcher, embeddings.rows, keys, 16)
finder.find(embeddings.rows(np.arange(8192)), 8, keys(np.arange(8192)))
print(json.dumps(peak[0]))
"""


def measure(work, *args):
    done = subprocess.run(
        [sys.executable, "-c", WATCH + work, *args],
        stdout=subprocess.PIPE,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Bytes of adding and of searching by number of vectors."""
    found = {}
    for count in (10_000, 40_000):
        folder = tmp_path_factory.mktemp("many")
        vectors = made_up_vectors(count, dimension=DIMENSION)
        embeddings = store_embeddings(folder, vectors, block_chunks=4000)
        args = [embeddings.url, str(folder / "index")]
        added = measure(ADD, *args, str(count // 10_000))
        found[count] = {"added": added, "search": measure(SEARCH, *args)}
    return found


def test_search_stays_below_the_bound_and_does_not_grow_with_the_index(measured):
    small, large = (measured[count]["search"] for count in sorted(measured))
    assert large < FIXED_BYTES
    assert large - small < 23 << 20  # 30,000 vectors more: 46 MB as fp32, 23 MB as fp16


def test_adding_takes_the_memory_of_the_shard(measured):
    for found in measured.values():
        assert found["added"] < 10_000 * (DIMENSION + 8) + 4000 * DIMENSION * 4 * 4 + (50 << 20)
