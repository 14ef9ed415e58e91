"""join | `python -m jobs.join_neighbors` | Spark | reads a training (or held-out) dataset, its KNN
map and the retrieval dataset | writes a joined dataset: samples with their neighbors' tokens, to be
read from object storage.
"""

import logging
import time
from typing import Any

from etl.spark import spark_session
from indexing.join import join
from indexing.join_plan import JoinConfig, describe_join, plan_join
from jobs.command_line import run_job

log = logging.getLogger(__name__)


def run(config: JoinConfig) -> dict[str, Any]:
    start = time.monotonic()
    task = plan_join(config)
    plan = describe_join(task, config.num_partitions)
    if config.dry_run:
        return plan
    log.info("%s", ", ".join(f"{name} {size}" for name, size in plan.items()))
    manifest = join(task, config.num_partitions, lambda: spark_session("retromill join_neighbors"))
    return {
        "joined_url": task.folder.url,
        "shards": len(manifest.shards),
        "samples": manifest.num_samples,
        "bytes": manifest.stored_bytes,
        "seconds": round(time.monotonic() - start, 3),
    }


if __name__ == "__main__":
    run_job("Join samples with the tokens of their neighbors, with Spark.", JoinConfig, run)
