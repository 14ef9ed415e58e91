import random
from itertools import combinations, pairwise

import pytest

from etl.components import connected_components, near_duplicate_edges
from etl.minhash import signatures
from tests.etl.test_minhash import edited, jaccard, random_text

pytestmark = pytest.mark.spark


def expected_components(edges):
    """node -> smallest node, by union-find."""
    parent = {node: node for edge in edges for node in edge}

    def root(node):
        while parent[node] != node:
            node = parent[node]
        return node

    for u, v in edges:
        a, b = root(u), root(v)
        parent[max(a, b)] = min(a, b)
    return {node: root(node) for node in parent}


def found_components(spark, edges):
    frame = connected_components(spark.createDataFrame(edges, "u long, v long"))
    rows = frame.collect()
    assert len({row["node"] for row in rows}) == len(rows)
    return {row["node"]: row["component"] for row in rows}


def test_components_are_those_of_union_find(spark):
    generator = random.Random(3)
    path = list(range(200))
    generator.shuffle(path)
    edges = list(pairwise(path))
    edges += [(5000, leaf) for leaf in range(4000, 4600)]
    edges += [
        (10_000 + generator.randrange(150), 10_000 + generator.randrange(150)) for _ in range(110)
    ]
    edges += [(1 << 40, 20_000), (20_000, 1 << 40), (30_000, 30_001), (30_000, 30_001)]
    edges = [(u, v) for u, v in edges if u != v]
    assert found_components(spark, edges) == expected_components(edges)


def test_no_edges_are_no_components(spark):
    assert found_components(spark, []) == {}


def planted_texts():
    """120 texts alone, 30 with copies of which 2% of the words differ, 30 with copies of which 30%
    differ, 20 with some near the threshold."""
    generator = random.Random(11)
    texts = [random_text(generator, generator.randrange(30, 400)) for _ in range(120)]
    for i in range(80):
        source = random_text(generator, generator.randrange(100, 400))
        share = 0.008 if i < 30 else 0.3 if i < 60 else 0.025
        texts += [source, edited(generator, source, share)]
    generator.shuffle(texts)
    return texts


def test_pairs_are_those_of_brute_force_jaccard(spark):
    """Against exact Jaccard at 0.8: precision above 0.9 over all pairs, 1 for pairs below 0.7;
    recall above 0.9 over all, 1 for pairs above 0.9."""
    texts = planted_texts()
    exact = {
        pair: jaccard(*(texts[i] for i in pair)) for pair in combinations(range(len(texts)), 2)
    }
    rows = [(i, bytearray(s.tobytes())) for i, s in enumerate(signatures(texts))]
    frame = spark.createDataFrame(rows, "node long, signature binary")
    found = {(row["u"], row["v"]) for row in near_duplicate_edges(frame, 0.8).collect()}
    wanted = {pair for pair, value in exact.items() if value >= 0.8}
    assert len(wanted) > 35
    precision, recall = len(found & wanted) / len(found), len(found & wanted) / len(wanted)
    print(f"{len(wanted)} pairs at 0.8 or above: precision {precision:.3f}, recall {recall:.3f}")
    assert precision > 0.9
    assert recall > 0.9
    assert all(exact[pair] >= 0.7 for pair in found)
    assert all(pair in found for pair, value in exact.items() if value >= 0.9)
