"""Samples against the golden ones: with documents in the reference's order, the same tokens,
labels, masks and neighbors. Which sample comes when is a project's own choice."""

from types import SimpleNamespace

import numpy as np
import pytest

from etl.retmmap import RetMMapReader
from indexing.knn_map import KNNMap
from model.samples import NeighborReader, SampleReader, split_documents
from tests.conformance.golden import FOLDER, cases

ROOT = FOLDER / "samples"
CASES = [
    pytest.param(case, split, id=f"{case['name']}-{split}")
    for case in cases("samples")
    for split, described in case["datasets"].items()
    if described
]


class Documents:
    """A token file as the dataset that samples are read from, its documents in a given order."""

    def __init__(self, name, documents, pad_id, document_key):
        self.file = RetMMapReader(ROOT / f"{name}.bin", ROOT / f"{name}.idx")
        first = [*self.file.first_chunk, self.file.num_chunks]
        chunks = [np.arange(first[d], first[d + 1]) for d in documents]
        self.order = np.concatenate(chunks)
        self.document_first_chunk = np.cumsum([0, *(len(part) for part in chunks)])
        # No training document is in the retrieval file: nothing is filtered out.
        self.document_keys = np.full(len(chunks), document_key, np.uint64)
        self.document_clusters = self.document_keys
        self.url, self.num_chunks = name, len(self.order)
        self.chunk_size = self.file.chunk_size
        self.manifest = SimpleNamespace(pad_id=pad_id, split="train")

    def get_chunk(self, ids):
        return self.file.get_chunk(self.order[ids])


@pytest.mark.parametrize(("case", "split"), CASES)
def test_content_of_samples_is_golden(case, split):
    golden = np.load(ROOT / case["datasets"][split]["file"])
    pad = case["pad_id"]
    training = Documents(case["train"], golden["doc_idx"], pad, document_key=1)
    db = RetMMapReader(ROOT / f"{case['retrieval']}.bin", ROOT / f"{case['retrieval']}.idx")
    retrieval = Documents(case["retrieval"], range(len(db.first_chunk)), pad, document_key=2)
    stored = KNNMap(ROOT / case["knn"])
    by_place = SimpleNamespace(k=stored.k, get=lambda ids: stored.get(training.order[ids]))
    neighbors = NeighborReader(by_place, retrieval, case["neighbors"])
    reader = SampleReader(training, case["seq_length"], neighbors)
    batch = reader.read(golden["shuffle_idx"][golden["indices"]])
    for name in ("tokens", "labels", "tokens_mask"):
        np.testing.assert_array_equal(getattr(batch, name), golden[name], err_msg=name)
    np.testing.assert_array_equal(batch.neighbors, golden["retrieved_ids"])
    np.testing.assert_array_equal(batch.neighbors_mask, golden["retrieved_mask"])
    # The reference's loss looks at input tokens, ours also at the labels.
    same = golden["loss_mask"] & (golden["labels"] != pad)
    assert (batch.loss_mask <= same).all()
    at_ends = same & ~batch.loss_mask
    assert (golden["tokens"][at_ends] == case["eos_id"]).all()


@pytest.mark.parametrize("case", cases("samples"), ids=lambda case: case["name"])
def test_bounds_of_splits_are_golden(case):
    num_documents = RetMMapReader(
        ROOT / f"{case['train']}.bin", ROOT / f"{case['train']}.idx"
    ).num_documents
    parts = split_documents(case["splits_string"], num_documents)
    assert [0, *(stop for _, stop in parts)] == case["split_bounds"]
    assert [first for first, _ in parts] == case["split_bounds"][:3]
