"""merge | `python -m jobs.merge_data` | one process | reads a retmmap dataset | writes one
NeMo-readable pair of `.bin` and `.idx`.
"""

from etl.merge import MergeConfig, merge_dataset
from jobs.command_line import run_job

if __name__ == "__main__":
    run_job("Merge the shards of a dataset into one pair of files.", MergeConfig, merge_dataset)
