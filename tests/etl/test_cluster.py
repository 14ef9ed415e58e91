"""Preparation by spark-submit on a master with two workers, its code shipped as a zip."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pyspark
import pytest

from etl.dataset import Dataset
from etl.java import find_java_home
from etl.prepare import PrepareConfig, prepare
from tests.etl.test_prepare import contents

pytestmark = [pytest.mark.spark, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SPARK_HOME = Path(pyspark.__file__).parent


def environment():
    """Without the checkout on any path: what runs comes from the zip."""
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(("SPARK", "PYTHON"))},
        "JAVA_HOME": find_java_home(),
        "SPARK_HOME": str(SPARK_HOME),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
    }


def start(folder, name, *arguments):
    command = [str(SPARK_HOME / "bin" / "spark-class"), *arguments]
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment(), cwd=folder)


def wait_for(folder, name, pattern):
    for _ in range(1200):
        found = re.search(pattern, (folder / f"{name}.log").read_text())
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError((folder / f"{name}.log").read_text())


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    host = ("--host", "127.0.0.1", "--webui-port", "0")
    package = "org.apache.spark.deploy"
    processes = [start(folder, "master", f"{package}.master.Master", *host, "--port", "0")]
    try:
        url = wait_for(folder, "master", r"Starting Spark master at (spark://\S+)")[1]
        for i in range(2):
            size = ("--cores", "1", "--memory", "900m", "--work-dir", str(folder / f"work{i}"))
            processes.append(
                start(folder, f"worker{i}", f"{package}.worker.Worker", *host, *size, url)
            )
        for i in range(2):
            wait_for(folder, f"worker{i}", "Successfully registered")
        yield url
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(30)


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """The zip for --py-files; its etl package can be told from the checkout's."""
    path = tmp_path_factory.mktemp("code") / "retromill.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in [*ROOT.glob("etl/*.py"), *ROOT.glob("jobs/*.py")]:
            text = file.read_text()
            if file.name == "split_writer.py":
                text = text.replace(
                    '"counts": {**self.counts', '"from_zip": True, "counts": {**self.counts'
                )
            archive.writestr(str(file.relative_to(ROOT)), text)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    generator = random.Random(8)
    words = [f"word{i}" for i in range(3000)]
    with open(path, "w") as file:
        for i in range(1500):
            if i % 10 != 1:
                text = " ".join(generator.choices(words, k=200))
            file.write(json.dumps({"text": f"{i} {text}"}) + "\n")
    return path


def submit(master, code, corpus, tokenizer_url, output):
    command = [
        *(str(SPARK_HOME / "bin" / "spark-submit"), "--master", master),
        *("--properties-file", str(ROOT / "spark-defaults.conf"), "--py-files", str(code)),
        *("--conf", "spark.executor.memory=512m", "--conf", "spark.driver.host=127.0.0.1"),
        *("--conf", "spark.sql.shuffle.partitions=2"),
        *("--conf", "spark.executor.extraJavaOptions=-XX:TieredStopAtLevel=1"),
        *("--conf", f"spark.pyspark.python={sys.executable}", "--conf", "spark.ui.enabled=false"),
        str(ROOT / "jobs" / "prepare_data.py"),
        *(f"--input_urls={corpus}", f"--output_url={output}", f"--tokenizer_url={tokenizer_url}"),
        *("--split_bytes=75000", "--splits_string=80,10,10", "--near_duplicates=mark"),
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=open(output.parent / "submit.log", "w"),
        env=environment(),
        cwd=output.parent,
        text=True,
    )


def result_of(process, folder):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, (folder / "submit.log").read_text()[-4000:]
    return json.loads(output.splitlines()[-1])


def executors():
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "CoarseGrainedExecutorBackend" in " ".join(process.info["cmdline"] or ())
    ]


def test_shipped_code_on_two_workers_makes_the_local_datasets_although_one_is_killed(
    master, code, corpus, tokenizer_url, spark, tmp_path
):
    process = submit(master, code, corpus, tokenizer_url, tmp_path / "out")
    splits = lambda: len(list(tmp_path.glob("out/*/splits/*.json")))
    while splits() < 4:
        time.sleep(0.05)
        assert process.poll() is None, (tmp_path / "submit.log").read_text()[-4000:]
    victim = executors()[0]
    for child in [*victim.children(recursive=True), victim]:
        child.kill()
    count = splits()
    result = result_of(process, tmp_path)
    assert count < splits()
    records = [json.loads(p.read_text()) for p in Path(result["url"], "splits").iterdir()]
    assert len(records) > 20
    assert all(record["from_zip"] for record in records)

    config = PrepareConfig(
        input_urls=str(corpus),
        output_url=str(tmp_path / "local"),
        tokenizer_url=tokenizer_url,
        split_bytes=75_000,
        splits_string="80,10,10",
        near_duplicates="mark",
    )
    local = prepare(config, lambda: spark)
    names = [
        sorted(str(p.relative_to(Path(r["url"]))) for p in Path(r["url"]).rglob("*"))
        for r in (result, local)
    ]
    assert names[0] == names[1]
    assert result["counts"] == local["counts"]
    for split, entry in local["datasets"].items():
        built = result["datasets"][split]
        assert built["fingerprint"] == entry["fingerprint"]
        assert contents(Dataset(built["url"])) == contents(Dataset(entry["url"]))
