"""The joined format: bytes, round trips and what readers refuse."""

import json
import struct
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import xxhash

from etl.storage import StageFolder
from indexing.joined import (
    HEADER,
    INDEX_HEADER,
    JoinedBlock,
    JoinedError,
    JoinedLayout,
    JoinedShardWriter,
    decode_block,
    encode_block,
    read_header,
    read_index,
)
from indexing.joined_manifest import NAME, JoinedManifest, JoinedShard, open_joined

LAYOUT = JoinedLayout(
    seq_length=8,
    chunk_size=4,
    neighbors=3,
    dtype_code=8,
    samples_per_block=2,
    blocks_per_shard=2,
)
SAMPLES = 7


def made_up_block(count, layout=LAYOUT, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {
        name: rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]
        for name, (dtype, shape) in layout.arrays(count).items()
    }
    return JoinedBlock(**arrays)


def blocks_of(layout):
    size = layout.samples_per_block
    return [
        made_up_block(min(size, SAMPLES - first), layout, first)
        for first in range(0, SAMPLES, size)
    ]


def write_dataset(folder, layout=LAYOUT):
    """Two shards, of two blocks each; the last block has one sample."""
    stage, blocks, shards = StageFolder(str(folder / "joined")), blocks_of(layout), []
    for first in range(0, SAMPLES, layout.samples_per_shard):
        count = min(layout.samples_per_shard, SAMPLES - first)
        with open(folder / "shard.joined", "wb") as file:
            writer = JoinedShardWriter(file, layout, first, count)
            start = first // layout.samples_per_block
            for block in blocks[start : start + layout.num_blocks(count)]:
                writer.add(block)
        writer.write_index(folder / "shard.idx")
        files = stage.store(f"shard-{first}", folder / "shard.joined", folder / "shard.idx")
        shards.append(JoinedShard(*files, first_sample=first, num_samples=count))
    names = [f.name for f in fields(JoinedManifest) if f.name.endswith("_fingerprint")]
    manifest = JoinedManifest(
        layout=layout,
        split="train",
        pad_id=0,
        eod_id=1,
        vocab_size=300,
        num_samples=SAMPLES,
        shards=tuple(shards),
        **{name: f"the {name}" for name in names},
    )
    stage.publish(NAME.removesuffix(".json"), manifest.to_json())
    return stage.url


@pytest.fixture
def url(tmp_path):
    return write_dataset(tmp_path)


def same(one, other):
    return all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))


def test_a_block_is_its_arrays_one_after_another():
    layout = JoinedLayout(4, 2, 1, 8, 1, 1)
    block = JoinedBlock(
        tokens=np.asarray([[1, 2, 3, 4, 5]], np.uint16),
        starts=np.asarray([[1, 0, 1]], np.uint8),
        keys=np.asarray([[[6, 7], [8, 9]]], np.uint64),
        neighbor_ids=np.asarray([[[10], [-1]]]),
        neighbor_keys=np.asarray([[[[11, 12]], [[0, 0]]]], np.uint64),
        neighbor_tokens=np.asarray([[[[13, 14, 15, 16]], [[0, 0, 0, 0]]]], np.uint16),
    )
    expected = struct.pack(
        "<5H3B4Q2q4Q8H",
        *(1, 2, 3, 4, 5, 1, 0, 1, 6, 7, 8, 9, 10, -1),
        11,
        12,
        *([0] * 2),
        *(13, 14, 15, 16),
        *([0] * 4),
    )
    assert encode_block(block, layout) == expected
    assert layout.block_bytes(1) == len(expected)


def test_a_shard_and_its_index_are_these_bytes(tmp_path):
    block = made_up_block(1)
    with open(tmp_path / "shard", "wb") as file:
        writer = JoinedShardWriter(file, LAYOUT, 20, 1)
        writer.add(block)
    writer.write_index(tmp_path / "index")
    stored = encode_block(block, LAYOUT)
    header = b"RETJOIN\x00" + struct.pack("<6I2QI", 1, 8, 8, 4, 3, 2, 20, 1, 0) + bytes(12)
    assert (tmp_path / "shard").read_bytes() == header + stored
    size, checksum = 64 + len(stored), xxhash.xxh64(stored).intdigest()
    index = b"RETJIDX\x00" + struct.pack("<2I5Q", 1, 0, 20, 1, 64, size, checksum)
    assert (tmp_path / "index").read_bytes() == index


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dtype_code", [8, 4])
def test_blocks_come_back(tmp_path, compression, dtype_code):
    layout = replace(LAYOUT, compression=compression, dtype_code=dtype_code)
    dataset = open_joined(write_dataset(tmp_path, layout))
    expected = blocks_of(layout)
    assert dataset.manifest.num_blocks == len(expected) == 4
    for number in (3, 0, 2, 1):
        found = dataset.block(number)
        assert same(found, expected[number])
        assert found.tokens.dtype == layout.dtype
        assert found.neighbor_ids.flags.aligned
    for number in (-1, 4):
        with pytest.raises(IndexError):
            dataset.block(number)


def stored_path(url, shard, part):
    file = getattr(open_joined(url).manifest.shards[shard], part)
    return StageFolder(url).fetch(file)


def patch(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("part", "offset", "data", "message"),
    [
        ("data", 0, b"RETJOIN\x01", "it is no joined shard"),
        ("data", 8, b"\x02", "version 2; this reader knows version 1"),
        ("data", 12, b"\x04", "dtype_code=4.*the manifest says.*dtype_code=8"),
        ("data", 16, b"\x10", "seq_length=16.*the manifest says.*seq_length=8"),
        ("data", 32, b"\x01", "first_sample=1"),
        ("data", 48, b"\x01", "compression=1"),
        ("data", 63, b"\x01", "last 12 bytes are not 0"),
        ("index", 0, b"RETJOIN", "it is no joined shard's index"),
        ("index", 8, b"\x02", "version 2"),
        ("index", 16, b"\x04", "2 blocks from sample 4; expected 2 from 0"),
        ("index", 24, b"\x01", "over-long"),
        ("index", 32, b"\x41", "do not ascend from 64"),
        ("index", 40, b"\x01\x00", "do not ascend"),
    ],
)
def test_readers_refuse_what_headers_do_not_promise(url, part, offset, data, message):
    patch(stored_path(url, 0, part), offset, data)
    with pytest.raises(JoinedError, match=message):
        open_joined(url).block(0)


@pytest.mark.parametrize("part", ["data", "index"])
@pytest.mark.parametrize("change", [-1, 1, -1000])
def test_readers_refuse_truncated_and_over_long_files(url, part, change):
    path = stored_path(url, 0, part)
    data = path.read_bytes()
    path.write_bytes(data + b"\0" if change > 0 else data[: max(change, -len(data) + 10)])
    with pytest.raises(JoinedError, match="over-long" if change > 0 else "truncated"):
        open_joined(url).block(0)


def test_the_index_of_another_shard_is_refused(url):
    stored_path(url, 0, "index").write_bytes(stored_path(url, 1, "index").read_bytes())
    with pytest.raises(JoinedError, match="from sample 4; expected 2 from 0"):
        open_joined(url).block(0)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_any_damaged_byte_of_a_block_is_noticed_and_others_are_read(tmp_path, compression):
    layout = replace(LAYOUT, compression=compression)
    url = write_dataset(tmp_path, layout)
    path, index = stored_path(url, 0, "data"), open_joined(url).shard(0).index
    for offset in range(int(index.offsets[1]), int(index.offsets[2])):
        before = path.read_bytes()[offset]
        patch(path, offset, bytes([before ^ 16]))
        dataset = open_joined(url)
        with pytest.raises(JoinedError, match=r"block 1: checksum \w{16}, its index says \w{16}"):
            dataset.block(1)
        assert same(dataset.block(0), blocks_of(layout)[0])
        patch(path, offset, bytes([before]))
    assert same(open_joined(url).block(1), blocks_of(layout)[1])


def test_a_checksum_does_not_stand_for_the_length():
    for layout in (LAYOUT, replace(LAYOUT, compression="zstd")):
        stored = encode_block(made_up_block(2, layout), layout)
        checksum = xxhash.xxh64_intdigest(stored)
        with pytest.raises(JoinedError, match="here: "):
            decode_block(stored, layout, 1, checksum, "here")
    nonsense = b"no zstd frame"
    with pytest.raises(JoinedError, match="expected a zstd frame"):
        decode_block(nonsense, layout, 1, xxhash.xxh64_intdigest(nonsense), "here")


def test_headers_need_all_their_bytes():
    with pytest.raises(JoinedError, match="truncated"):
        read_header(bytes(HEADER.size - 1), "here")
    with pytest.raises(JoinedError, match="truncated"):
        read_index(bytes(INDEX_HEADER.size - 1), "here")


def test_blocks_of_other_shapes_or_types_are_not_written(tmp_path):
    block = made_up_block(2)
    for wrong in (
        replace(block, tokens=block.tokens[:, :-1]),
        replace(block, tokens=block.tokens.astype(np.int32)),
        replace(block, neighbor_ids=block.neighbor_ids[..., :2]),
    ):
        with pytest.raises(JoinedError, match="; expected "):
            encode_block(wrong, LAYOUT)


def test_a_shard_holds_as_many_samples_as_its_header_says(tmp_path):
    with open(tmp_path / "shard", "wb") as file:
        writer = JoinedShardWriter(file, LAYOUT, 0, 3)
        with pytest.raises(JoinedError, match="a block of 1 samples; expected 2"):
            writer.add(made_up_block(1))
        writer.add(made_up_block(2))
        with pytest.raises(JoinedError, match="2 samples were added to a shard of 3"):
            writer.write_index(tmp_path / "index")
        writer.add(made_up_block(1))
        with pytest.raises(JoinedError, match="expected 0"):
            writer.add(made_up_block(1))


@pytest.mark.parametrize(
    "change",
    [
        {"seq_length": 6},
        {"neighbors": 0},
        {"samples_per_block": 0},
        {"blocks_per_shard": 0},
        {"dtype_code": 9},
        {"compression": "gzip"},
        {"level": 99},
    ],
)
def test_layouts_that_fit_no_block_are_refused(change):
    with pytest.raises(JoinedError, match=next(iter(change)).partition("_")[0]):
        replace(LAYOUT, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "expected a manifest with format"),
        ({"version": 2}, "version 2; this code reads version 1"),
        ({"pad_id": 5}, "it was edited"),
        ({"eod_id": None}, "it was edited"),
    ],
)
def test_other_and_edited_manifests_are_refused(url, change, message):
    edit_manifest(url, lambda value: value | change)
    with pytest.raises(JoinedError, match=message):
        open_joined(url)


def edit_manifest(url, change):
    path = StageFolder(url).path_of(NAME)
    with open(path) as file:
        value = json.load(file)
    with open(path, "w") as file:
        json.dump(change(value), file)


def test_a_manifest_without_a_field_is_refused(url):
    edit_manifest(url, lambda value: {k: v for k, v in value.items() if k != "pad_id"})
    with pytest.raises(JoinedError, match=r"\['pad_id'\] are missing"):
        open_joined(url)


def test_a_manifest_without_a_shard_is_refused(url):
    manifest = open_joined(url).manifest
    for shards in (manifest.shards[:1], manifest.shards[::-1]):
        wrong = replace(manifest, shards=shards).to_json()
        edit_manifest(url, lambda _, wrong=wrong: wrong)
        with pytest.raises(JoinedError, match="7 samples in shards of 4"):
            open_joined(url)


def test_a_folder_without_a_manifest_is_no_dataset(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"jobs\.join_neighbors"):
        open_joined(str(tmp_path))


def test_the_fingerprint_depends_on_every_part(url):
    manifest = open_joined(url).manifest
    plain = asdict(manifest)
    others = [replace(manifest, **{n: "other"}) for n in plain if n.endswith("_fingerprint")]
    others.append(replace(manifest, layout=replace(manifest.layout, level=4)))
    found = {other.fingerprint for other in [manifest, *others]}
    assert len(found) == 1 + len(others)
