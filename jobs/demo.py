"""demo | `python -m jobs.demo` | all of them | reads text found on this machine, or the user's |
runs every job in order, writes report.json and report.html.
"""

import os
from typing import Any

from demo.chain import DemoConfig, run_chain
from demo.report import write_report
from jobs.command_line import run_job


def run(config: DemoConfig) -> dict[str, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return write_report(config.output_url, run_chain(config))


if __name__ == "__main__":
    run_job("Turn loose JSON into a RETRO model and a report.", DemoConfig, run)
