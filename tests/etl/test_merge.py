import json
import subprocess
import sys

import numpy as np
import pytest

from etl.merge import MergeConfig, MergeError, merge_dataset
from etl.retmmap import RetMMapReader, RetMMapWriter


def expected_pair(dataset, folder):
    """All documents of the dataset written in one go."""
    manifest = dataset.manifest
    with open(folder / "all.bin", "wb") as file:
        writer = RetMMapWriter(file, manifest.layout, manifest.pad_id, nemo_padding=True)
        for i in range(len(manifest.shards)):
            reader = dataset.shard(i)[0]
            for document in range(reader.num_documents):
                tokens = reader.get_document(document)
                writer.add(tokens[tokens != manifest.pad_id])
    with open(folder / "all.idx", "wb") as file:
        writer.write_index(file)
    return (folder / "all.bin").read_bytes(), (folder / "all.idx").read_bytes()


@pytest.mark.parametrize("name", ["training", "retrieval"])
def test_a_merged_pair_is_what_writing_in_one_go_gives(data, name, tmp_path):
    dataset = getattr(data, name)
    result = merge_dataset(MergeConfig(dataset.url, str(tmp_path / "out" / name)))
    pair = [(tmp_path / "out" / f"{name}{suffix}").read_bytes() for suffix in (".bin", ".idx")]
    assert tuple(pair) == expected_pair(dataset, tmp_path)
    reader = RetMMapReader(result["bin"], result["idx"])
    reader.check_chunk_addresses()
    ids = np.arange(dataset.num_chunks)
    assert np.array_equal(reader.get_chunk(ids), dataset.get_chunk(ids))
    assert [len(part) for part in pair] == [result["bin_bytes"], result["idx_bytes"]]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"{name}.bin", f"{name}.idx"}


def test_merging_again_does_nothing_and_a_missing_index_is_completed(data, tmp_path):
    config = MergeConfig(data.training.url, str(tmp_path / "a"))
    merge_dataset(config)
    index = (tmp_path / "a.idx").read_bytes()
    written = (tmp_path / "a.bin").stat().st_mtime_ns
    (tmp_path / "a.idx").unlink()  # as if killed between the two
    merge_dataset(config)
    assert (tmp_path / "a.idx").read_bytes() == index
    assert (tmp_path / "a.bin").stat().st_mtime_ns == written


def test_another_pair_is_not_overwritten(data, tmp_path):
    merge_dataset(MergeConfig(data.training.url, str(tmp_path / "a")))
    before = (tmp_path / "a.bin").read_bytes()
    with pytest.raises(MergeError, match=r"a\.bin: holds .* something else"):
        merge_dataset(MergeConfig(data.retrieval.url, str(tmp_path / "a")))
    assert (tmp_path / "a.bin").read_bytes() == before


def test_the_job_prints_its_plan_and_its_result(data, tmp_path):
    def run(*options):
        command = [sys.executable, "-m", "jobs.merge_data", f"--dataset_url={data.training.url}"]
        done = subprocess.run(
            [*command, f"--output_prefix={tmp_path}/m", *options], capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    plan = run("--dry_run")
    assert list(tmp_path.iterdir()) == []
    result = run()
    assert result.pop("seconds") > 0
    assert result == plan
    assert (tmp_path / "m.idx").stat().st_size == result["idx_bytes"]
    with pytest.raises(FileNotFoundError):
        merge_dataset(MergeConfig(str(tmp_path / "absent"), str(tmp_path / "n")))
