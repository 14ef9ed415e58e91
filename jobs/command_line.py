"""What all jobs share: command line from a config dataclass, exit codes, logs on stderr, one JSON
line on stdout."""

import json
import logging
import os
import resource
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

from jsonargparse import ArgumentParser

from etl.deadline import RemoteError
from indexing.runner import ClusterError


def run_job(
    description: str,
    config_class: type[Any],
    job: Callable[[Any], dict[str, Any] | None],
    args: list[str] | None = None,
) -> None:
    """Parses the command line into `config_class`, runs the job, prints its result as the last
    line; exits.

    Options come from a YAML file (--config), then from dotted overrides. Exit codes: 0 done, 2 bad
    configuration or input (ValueError, FileNotFoundError), 1 anything else; of what a cluster or a
    storage did the message is printed, of any other error the traceback.
    """
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%X",
    )
    for chatty in ("distributed", "py4j", "sentence_transformers"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # A dataset of some hundred shards is as many memory-mapped files; the usual limit is 1024.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    parser = ArgumentParser(description=description)
    parser.add_argument(
        "--config", action="config", help="YAML file with options; later options override it"
    )
    stages = {f.name: f.type for f in fields(config_class) if f.name == "stage"}
    for name, values in stages.items():
        parser.add_argument(name, type=values, help="what to do")
    parser.add_class_arguments(config_class, as_group=False, skip={*stages, "dry_run"})
    if any(f.name == "dry_run" for f in fields(config_class)):
        parser.add_argument(
            "--dry_run",
            action="store_true",
            help="check the inputs, print the plan and write nothing",
        )
    parsed = parser.parse_args(args)
    parsed.pop("config", None)

    def work() -> dict[str, Any] | None:
        # Parts of a configuration check themselves when they are made.
        return job(config_class(**cast(Any, parser.instantiate(parsed)).as_dict()))

    code = _run(work)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _leave_at_once(code)
    sys.exit(code)


def _leave_at_once(code: int) -> None:
    """Ends a rank of torchrun without the interpreter's clean-up, in which threads of torch now and
    then abort a process that has done all its work."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(work: Callable[[], dict[str, Any] | None]) -> int:
    try:
        result = work()
    except (ValueError, FileNotFoundError, ClusterError, RemoteError) as error:
        if os.environ.get("RETROMILL_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ClusterError | RemoteError) else 2
    sys.stderr.flush()
    if result is not None:
        print(json.dumps(result), flush=True)
    return 0
