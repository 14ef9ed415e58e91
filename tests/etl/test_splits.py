import json
from collections import Counter

import pytest

from etl.records import Document
from etl.sources import InputError
from etl.splits import Fate, SplitRule, assign_split, load_split_list, parse_weights

WEIGHTS = parse_weights("70,15,15")


def document(name=None, split=None, content_hash=b"\x00" * 16):
    return Document(0, 0, "text", content_hash, 4, split=split, id=name)


def test_the_assignment_follows_the_weights_and_the_seed():
    hashes = [i.to_bytes(16, "little") for i in range(4000)]
    counts = Counter(assign_split(h, WEIGHTS, 0) for h in hashes)
    assert counts["retrieval"] == 0
    for split, weight in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
        assert abs(counts[split] / 4000 - weight) < 0.03
    assert [assign_split(h, WEIGHTS, 1) for h in hashes] != [
        assign_split(h, WEIGHTS, 0) for h in hashes
    ]


def test_a_record_names_its_split_before_the_list_and_the_list_before_the_hash():
    rule = SplitRule(parse_weights("1,0,0"), 0, {"a": "test"}, True)
    assert rule.split_of(document("a", "validation"), None) == "validation"
    assert rule.split_of(document("a"), None) == "test"
    assert rule.split_of(document("b"), None) == "train"


def test_a_cluster_goes_where_its_first_document_goes():
    rule = SplitRule(WEIGHTS, 0, {}, True)
    for i in range(50):
        head = i.to_bytes(16, "big")
        fate = Fate(None, head, False, True)
        assert rule.split_of(document(), fate) == assign_split(head, WEIGHTS, 0)


def test_a_document_is_held_back_if_it_or_its_cluster_is_held_out():
    rule = SplitRule(parse_weights("1,0,0"), 0, {}, True)
    alone = Fate(None, b"\x00" * 16, False, True)
    assert rule.is_held_back("test", None)
    assert rule.is_held_back("validation", alone)
    assert not rule.is_held_back("train", None)
    assert not rule.is_held_back("train", alone)
    assert rule.is_held_back("train", alone._replace(is_held_out=True))
    all_out = SplitRule(parse_weights("0,0,1"), 0, {}, True)
    assert all_out.is_held_back("train", alone)
    assert not all_out.is_held_back("train", alone._replace(has_assigned=False))


def test_a_list_is_read_and_its_faults_are_named(tmp_path):
    path = tmp_path / "splits.jsonl"
    path.write_text('{"id": 5, "split": "test"}\n\n{"id": "b", "split": "train"}\n')
    assert load_split_list(str(path)) == {"5": "test", "b": "train"}
    for line, message in (
        ("nonsense", "line 2: not JSON"),
        (json.dumps({"id": "a", "split": "dev"}), "line 2: expected"),
        (json.dumps({"split": "test"}), "line 2: expected"),
        (json.dumps({"id": "a", "split": "train"}), "line 2: 'a' is also in 'test'"),
    ):
        path.write_text('{"id": "a", "split": "test"}\n' + line)
        with pytest.raises(InputError, match=message):
            load_split_list(str(path))
    with pytest.raises(FileNotFoundError):
        load_split_list(str(tmp_path / "absent"))
