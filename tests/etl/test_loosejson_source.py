import json

import pytest

from etl.loosejson_source import LooseJsonSource

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def table(spark, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loose")
    lines = [json.dumps({"body": f"text {i}", "id": i, "src": "here"}) for i in range(50)]
    lines[7] = "not json"
    (folder / "a.jsonl").write_text("\n".join(lines))
    spark.dataSource.register(LooseJsonSource)
    reader = spark.read.format("loosejson").option("text_key", "body")
    return reader.option("split_bytes", 300).load(str(folder))


def test_every_record_is_a_row_and_a_bad_one_says_why(table):
    rows = sorted(table.collect(), key=lambda row: row["offset"])
    assert len(rows) == 50
    [bad] = [row for row in rows if row["reason"]]
    assert rows.index(bad) == 7
    assert bad["text"] is None
    assert "not JSON" in bad["reason"]
    assert [r["text"] for r in rows if not r["reason"]] == [
        f"text {i}" for i in range(50) if i != 7
    ]
    assert (rows[3]["id"], rows[3]["src"]) == ("3", "here")
    assert rows[0]["file"].endswith("a.jsonl")


def test_partitions_are_splits_and_sql_works_on_it(table):
    assert table.rdd.getNumPartitions() > 4
    assert table.where("reason is null").selectExpr("max(length(text)) as n").first()["n"] == 7


def test_missing_inputs_are_named(spark):
    with pytest.raises(Exception, match=r"absent\.jsonl"):
        spark.read.format("loosejson").load("absent.jsonl").collect()
