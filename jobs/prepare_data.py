"""prepare | `python -m jobs.prepare_data`, also `spark-submit jobs/prepare_data.py` | Spark | reads
loose JSON | writes retmmap datasets: shards + manifest, one each for train, validation, test and
retrieval.
"""

from typing import Any

from etl.prepare import PrepareConfig, prepare
from etl.spark import spark_session
from jobs.command_line import run_job


def run(config: PrepareConfig) -> dict[str, Any]:
    return prepare(config, lambda: spark_session("retromill prepare_data"))


if __name__ == "__main__":
    run_job(
        "Tokenize, pad and chunk loose JSON into retmmap datasets with Spark.", PrepareConfig, run
    )
