"""How far the stages under a folder are, from their records alone: no cluster, no model.

A job announces its stages in `plan.json` before it starts; `status` compares that with what is
there. Storage only.
"""

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from etl.storage import StageFolder, filesystem_of, join_url, read_json

NAME = "plan.json"


def announce(
    folder: StageFolder, kind: str, fingerprint: str, stages: Mapping[str, tuple[str, int]]
) -> None:
    """Writes which records to expect: stage -> (pattern of their names, how many). `fingerprint` is
    that of the dataset they are made from."""
    expected = {stage: {"records": records, "of": of} for stage, (records, of) in stages.items()}
    value = {"kind": kind, "dataset_fingerprint": fingerprint, "stages": expected}
    folder.publish(NAME.removesuffix(".json"), value)


def read_status(output_url: str, fingerprint: str) -> list[dict[str, Any]]:
    """For each folder below output_url made from that dataset: its url, kind, and of each stage how
    many records are `done` `of` how many."""
    filesystem, root = filesystem_of(output_url)
    filesystem.invalidate_cache()
    if not filesystem.isdir(root):
        raise FileNotFoundError(f"{output_url}: no such folder; nothing was started there")
    found = []
    for path in sorted(str(p) for p in filesystem.glob(f"{root.rstrip('/')}/*/{NAME}")):
        url = join_url(output_url, path.rsplit("/", 2)[1])
        plan = read_json(join_url(url, NAME))
        if plan["dataset_fingerprint"] == fingerprint:
            found.append({"url": url, "kind": plan["kind"], **_progress(url, plan["stages"])})
    return found


def _progress(url: str, stages: Mapping[str, Any]) -> dict[str, Any]:
    filesystem, root = filesystem_of(url)
    prefix = root.rstrip("/") + "/"
    names = [str(p).removeprefix(prefix) for p in filesystem.find(root) if str(p).endswith(".json")]
    done = {
        stage: {
            "done": sum(fnmatch(name, f"{expected['records']}.json") for name in names),
            "of": expected["of"],
        }
        for stage, expected in stages.items()
    }
    return {"finished": all(s["done"] >= s["of"] for s in done.values()), "stages": done}
