import pytest

from indexing.index_choice import choose_index

GIB = 2**30


@pytest.mark.parametrize(
    ("vectors", "memory", "device", "factory", "merged"),
    [
        (200_000, 8 * GIB, "cpu", "Flat", True),
        (200_001, 8 * GIB, "cpu", "IVF1788,SQ8", True),
        (20_000_000, 64 * GIB, "cuda", "Flat", True),
        (40_000_000, 64 * GIB, "cuda", "IVF25298,SQ8", True),
        (100_000_000, 8 * GIB, "cpu", "IVF40000,RaBitQ", True),
        (1_000_000_000, 8 * GIB, "cpu", "IVF126491,SQ8", False),
    ],
)
def test_choice_by_size_memory_and_device(vectors, memory, device, factory, merged):
    choice = choose_index(vectors, 384, memory, device)
    assert (choice.factory, choice.merge_shards) == (factory, merged)
    assert choice.index_bytes > 384 / 8 * vectors
    assert (choice.least_shards == 1) == merged
    assert choice.least_shards * memory > choice.index_bytes
    assert str(vectors) in choice.reasons[0]


def test_a_given_factory_is_kept_and_measured_against_memory():
    choice = choose_index(100_000_000, 768, 8 * GIB, "cpu", "IVF4096,PQ64")
    assert choice.factory == "IVF4096,PQ64"
    assert choice.index_bytes == 100_000_000 * 72
    assert choice.merge_shards
    assert not choose_index(100_000_000, 768, 8 * GIB, "cpu", "IVF4096,Flat").merge_shards
