"""Own-document filtering and the split into shards against the golden ones."""

import numpy as np
import pytest

from indexing.faiss_index import shard_range
from indexing.neighbors import take_first
from tests.conformance.golden import FOLDER, cases

CASES = [pytest.param(case, id=case["name"]) for case in cases("dedup")]


@pytest.mark.parametrize("case", CASES)
def test_filtering_keeps_the_golden_neighbors(case):
    golden = np.load(FOLDER / "dedup" / f"{case['name']}.npz")
    candidates, own = golden["I"], golden["own_range"]
    banned = (candidates >= own[:, :1]) & (candidates < own[:, 1:])
    np.testing.assert_array_equal(take_first(candidates, banned, case["K"]), golden["expected"])
    blocks = [
        take_first(candidates[start:stop], banned[start:stop], case["K"])
        for start, stop in case["process_blocks"]
    ]
    np.testing.assert_array_equal(np.concatenate(blocks), golden["expected"])


@pytest.mark.parametrize("case", CASES)
def test_shards_are_the_golden_ranges(case):
    total = int(np.load(FOLDER / "dedup" / f"{case['name']}.npz")["total_chunks"])
    found = shard_range(total, case["total_shards"], case["shard_id"])
    assert found == (case["shard_start"], case["shard_stop"])


@pytest.mark.parametrize("split", cases("dedup", "shard_splits"))
def test_shard_splits_are_golden(split):
    total, shards = split["total_chunks"], split["total_shards"]
    found = [list(shard_range(total, shards, i)) for i in range(shards)]
    assert found == [list(span) for span in split["ranges"]]
