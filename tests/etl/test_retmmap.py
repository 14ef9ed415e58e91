import io

import numpy as np
import pytest

from etl.merge import merge
from etl.retmmap import (
    DTYPES,
    HEADER,
    Layout,
    RetMMapError,
    RetMMapReader,
    RetMMapWriter,
    write_index,
)

DOCUMENTS = [[1, 2, 3], [4] * 8, [5] * 17, [6]]


def write(folder, layout, documents=DOCUMENTS, nemo_padding=False, name="a"):
    with open(folder / f"{name}.bin", "wb") as bin_file, open(folder / f"{name}.idx", "wb") as idx:
        writer = RetMMapWriter(bin_file, layout, 0, nemo_padding)
        for document in documents:
            writer.add(document)
        writer.write_index(idx)
    return folder / f"{name}.bin", folder / f"{name}.idx"


@pytest.mark.parametrize("code", sorted(DTYPES))
@pytest.mark.parametrize("retrieval", [False, True])
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_every_dtype_and_stride_reads_back(tmp_path, code, retrieval, stride):
    layout = Layout(8, stride, code, retrieval)
    reader = RetMMapReader(*write(tmp_path, layout))
    reader.check_chunk_addresses()
    assert reader.layout == layout
    for i, document in enumerate(DOCUMENTS):
        found = reader.get_document(i)
        assert found.dtype == DTYPES[code]
        assert found[: len(document)].tolist() == document
        assert not found[len(document) :].any()
    assert reader.num_chunks == sum((size - 8) // stride + 1 for size in reader.sizes)


def test_full_document_gets_a_pad_chunk_only_with_nemo_padding(tmp_path):
    layout = Layout.of(8, np.uint16)
    assert RetMMapReader(*write(tmp_path, layout)).sizes.tolist() == [8, 8, 24, 8]
    nemo = RetMMapReader(*write(tmp_path, layout, nemo_padding=True, name="nemo"))
    assert nemo.sizes.tolist() == [8, 16, 24, 8]


def test_continuation_never_crosses_the_document(tmp_path):
    reader = RetMMapReader(*write(tmp_path, Layout.of(8, np.uint16, retrieval_db=True)))
    chunks = reader.get_chunk(np.arange(reader.num_chunks))
    owner = reader.chunk_to_doc(np.arange(reader.num_chunks))
    for chunk, document in zip(chunks, owner, strict=True):
        assert set(chunk.tolist()) <= {0, *DOCUMENTS[document]}


def test_merge_equals_a_single_build(tmp_path):
    layout = Layout.of(8, np.int32, retrieval_db=True, stride=4)
    parts = [
        RetMMapReader(*write(tmp_path, layout, DOCUMENTS[:1], name="first")),
        RetMMapReader(*write(tmp_path, layout, DOCUMENTS[1:], name="second")),
    ]
    bin_file, idx_file = io.BytesIO(), io.BytesIO()
    merge(parts, bin_file, idx_file)
    whole = write(tmp_path, layout, name="whole")
    assert (bin_file.getvalue(), idx_file.getvalue()) == tuple(p.read_bytes() for p in whole)


def test_merge_refuses_different_layouts(tmp_path):
    a = RetMMapReader(*write(tmp_path, Layout.of(8, np.uint16), name="a"))
    b = RetMMapReader(*write(tmp_path, Layout.of(8, np.int32), name="b"))
    with pytest.raises(RetMMapError, match="cannot merge"):
        merge([a, b], io.BytesIO(), io.BytesIO())


def patched(path, offset, content):
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"X", "not a retmmap index"),
        (9, b"\x02", "version 2"),
        (17, b"\x09", "dtype code 9"),
        (42, b"\x02", "retrieval flag 2"),
        (13, b"\x05", "stride 5 does not divide"),
        (18, b"\x05", "truncated"),
        (18, b"\x03", "over-long"),
        (HEADER.size, b"\x09", "multiple"),
    ],
    ids=["magic", "version", "dtype", "flag", "stride", "truncated", "over-long", "size"],
)
def test_reader_refuses_a_damaged_index(tmp_path, offset, content, message):
    bin_path, idx_path = write(tmp_path, Layout.of(8, np.uint16))
    patched(idx_path, offset, content)
    with pytest.raises(RetMMapError, match=message) as raised:
        RetMMapReader(bin_path, idx_path)
    assert str(idx_path) in str(raised.value)


@pytest.mark.parametrize("change", [-1, -2, 1, 16])
def test_reader_refuses_tokens_of_another_length(tmp_path, change):
    bin_path, idx_path = write(tmp_path, Layout.of(8, np.uint16))
    raw = bin_path.read_bytes()
    bin_path.write_bytes(raw[:change] if change < 0 else raw + bytes(change))
    with pytest.raises(RetMMapError, match=str(bin_path)):
        RetMMapReader(bin_path, idx_path)


def test_reader_refuses_an_index_cut_inside_its_header(tmp_path):
    bin_path, idx_path = write(tmp_path, Layout.of(8, np.uint16))
    idx_path.write_bytes(idx_path.read_bytes()[:20])
    with pytest.raises(RetMMapError, match="header"):
        RetMMapReader(bin_path, idx_path)


@pytest.mark.parametrize("position", [HEADER.size + 4 * 4, HEADER.size + 12 * 4])
def test_reader_refuses_tables_that_disagree_with_the_sizes(tmp_path, position):
    bin_path, idx_path = write(tmp_path, Layout.of(8, np.uint16))
    patched(idx_path, position + 8, b"\x07")
    with pytest.raises(RetMMapError):
        RetMMapReader(bin_path, idx_path)


def test_writer_refuses_ids_that_do_not_fit_and_empty_documents():
    writer = RetMMapWriter(io.BytesIO(), Layout.of(8, np.uint16), 0)
    with pytest.raises(RetMMapError, match="65536"):
        writer.add([65536])
    with pytest.raises(RetMMapError, match="no tokens"):
        writer.add([])


@pytest.mark.parametrize(("chunk_size", "stride"), [(0, 1), (8, 3), (8, 0)])
def test_layout_refuses_sizes_that_cannot_be(chunk_size, stride):
    with pytest.raises(RetMMapError):
        Layout.of(chunk_size, np.uint16, stride=stride)


def test_index_of_ten_million_chunks_is_built_from_arrays(tmp_path):
    layout = Layout.of(64, np.uint16, retrieval_db=True)
    counts = np.random.default_rng(0).integers(1, 20, 1_000_000)
    with open(tmp_path / "big.idx", "wb") as file:
        chunks = write_index(file, layout, (counts * 64).astype(np.int32))
    assert chunks == counts.sum() > 9_900_000
    addresses = np.memmap(tmp_path / "big.idx", "<i8", "r", HEADER.size + 20 * len(counts))
    inside = np.arange(chunks) + np.repeat(np.arange(len(counts)), counts)
    assert np.array_equal(addresses, inside * 128)
