"""Token files against the golden ones: every byte written, every value read."""

import io
import json

import numpy as np
import pytest

from etl.merge import merge
from etl.retmmap import Layout, RetMMapError, RetMMapReader, RetMMapWriter
from tests.conformance.golden import FOLDER, cases

ROOT = FOLDER / "retmmap"
CASES = cases("retmmap")


def of_kind(*kinds):
    return [pytest.param(case, id=case["name"]) for case in CASES if case["kind"] in kinds]


def reader(name):
    return RetMMapReader(ROOT / f"{name}.bin", ROOT / f"{name}.idx")


def test_every_kind_is_known():
    assert {case["kind"] for case in CASES} <= {"build", "merge", "read_only", "invalid"}


@pytest.mark.parametrize("case", of_kind("build", "merge"))
def test_writer_gives_the_golden_bytes(case):
    spec = json.loads((ROOT / f"{case['name']}.docs.json").read_text())
    layout = Layout.of(spec["chunk_size"], spec["dtype"], spec["retrieval_db"], spec["stride"])
    bin_file, idx_file = io.BytesIO(), io.BytesIO()
    writer = RetMMapWriter(bin_file, layout, spec["pad_id"], nemo_padding=True)
    for document in spec["docs"]:
        writer.add(document)
    writer.write_index(idx_file)
    assert bin_file.getvalue() == (ROOT / f"{case['name']}.bin").read_bytes()
    assert idx_file.getvalue() == (ROOT / f"{case['name']}.idx").read_bytes()


@pytest.mark.parametrize("case", of_kind("merge"))
def test_merge_gives_the_golden_bytes(case):
    bin_file, idx_file = io.BytesIO(), io.BytesIO()
    merge([reader(part) for part in case["parts"]], bin_file, idx_file)
    assert bin_file.getvalue() == (ROOT / f"{case['name']}.bin").read_bytes()
    assert idx_file.getvalue() == (ROOT / f"{case['name']}.idx").read_bytes()


@pytest.mark.parametrize("case", of_kind("build", "merge", "read_only"))
def test_reader_gives_the_golden_values(case):
    opened, golden = reader(case["name"]), np.load(ROOT / f"{case['name']}.reads.npz")
    opened.check_chunk_addresses()
    ids, span = golden["chunk_ids"], np.arange(*golden["slice_range"])
    for chunks, suffix, continuation in ((ids, "", True), (ids, "_no_continuation", False)):
        np.testing.assert_array_equal(
            opened.get_chunk(chunks, continuation), golden[f"chunks{suffix}"]
        )
        np.testing.assert_array_equal(
            opened.get_chunk(span, continuation), golden[f"slice_chunks{suffix}"]
        )
    every = np.arange(opened.num_chunks)
    np.testing.assert_array_equal(opened.chunk_to_doc(every), golden["chunk_to_doc"])
    asked = zip(golden["get_chunk_id_doc"], golden["get_chunk_id_offset"], strict=True)
    found = [opened.get_chunk_id(int(d), int(offset)) for d, offset in asked]
    assert found == golden["get_chunk_id_result"].tolist()
    np.testing.assert_array_equal(opened.sizes, golden["doc_sizes"])
    np.testing.assert_array_equal(opened.first_chunk, golden["doc_first_chunk"])
    document, offset = map(int, golden["doc_read"])
    np.testing.assert_array_equal(opened.get_document(document, offset), golden["doc_read_tokens"])


@pytest.mark.parametrize("case", of_kind("build", "merge", "read_only"))
def test_reader_refuses_offsets_beyond_the_document(case):
    opened, golden = reader(case["name"]), np.load(ROOT / f"{case['name']}.reads.npz")
    for document, offset in golden["get_chunk_id_error"].tolist():
        with pytest.raises((IndexError, RetMMapError)):
            opened.get_chunk_id(document, offset)


@pytest.mark.parametrize("case", of_kind("invalid"))
def test_reader_refuses_invalid_files(case):
    with pytest.raises(RetMMapError):
        reader(case["name"])
