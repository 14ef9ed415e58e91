"""The builder of all services, and the embedder that they share."""

import threading

import numpy as np
import pytest

from etl.storage import StorageError
from model.export import export_model
from serving.chunk_rules import ChunkRules
from serving.embedding import SharedEmbedder
from serving.live_documents import LiveConfig
from serving.services import RetrievalConfig, open_services
from tests.model.test_export import saved_run
from tests.serving.offline import EMBEDDER
from tests.serving.word_embedder import WordEmbedder


@pytest.fixture(scope="module")
def model_url(data, tmp_path_factory):
    """An exported model with the tokenizer and chunk_size of the other fixtures."""
    folder = tmp_path_factory.mktemp("model")
    export_model(saved_run(folder / "run", data), str(folder / "exported"))
    return str(folder / "exported")


@pytest.fixture
def urls(offline):
    return {"index_url": offline.index_url, "retrieval_url": offline.dataset.url}


def test_nothing_is_opened_when_nothing_is_configured(model_url):
    assert open_services(RetrievalConfig(), model_url) is None


def test_live_documents_alone_take_their_rules_from_the_model(model_url, rules, tmp_path):
    config = RetrievalConfig(embedder=EMBEDDER, live=LiveConfig(str(tmp_path / "live")))
    services = open_services(config, model_url)
    assert (services.static, list(services.combined.services)) == (None, ["dynamic"])
    assert services.rules.identity == rules.identity
    assert services.combined.is_empty()
    services.dynamic.add([{"text": "the captain's boat in the storm"}])
    [row] = services.combined.query(["a ship"], 1).found
    assert row[0].text == "the captain's boat in the storm"


def test_an_index_and_live_documents_share_embedder_and_rules(urls, model_url):
    config = RetrievalConfig(**urls, embedder=EMBEDDER, live=LiveConfig(), dynamic_weight=2.0)
    services = open_services(config, model_url)
    assert services.combined.weights == {"static": 1.0, "dynamic": 2.0}
    assert services.static.embedder is services.dynamic.embedder is services.embedder
    assert services.static.rules is services.dynamic.rules
    only = open_services(RetrievalConfig(**urls, embedder=EMBEDDER))
    assert (only.dynamic, list(only.combined.services)) == (None, ["static"])


def test_a_model_with_another_chunk_size_is_refused(urls, data, tmp_path):
    export_model(saved_run(tmp_path / "run", data, chunk_size=8), str(tmp_path / "exported"))
    config = RetrievalConfig(**urls, embedder=EMBEDDER)
    with pytest.raises(StorageError, match=r"chunk_size\) .*, 8\], the dataset .*, 16\]"):
        open_services(config, str(tmp_path / "exported"))


def test_incomplete_configurations_are_refused(offline):
    with pytest.raises(ValueError, match="together with the retrieval dataset"):
        open_services(RetrievalConfig(index_url=offline.index_url))
    with pytest.raises(ValueError, match="need an exported model"):
        open_services(RetrievalConfig(embedder=EMBEDDER, live=LiveConfig()))


def test_rules_come_from_retrieval_datasets_only(data):
    with pytest.raises(StorageError, match="is the train dataset"):
        ChunkRules.of_dataset(data.training)


def test_a_shared_embedder_is_used_by_one_thread_at_a_time():
    class Counting(WordEmbedder):
        inside = most = 0

        def embed(self, texts):
            self.inside += 1
            self.most = max(self.most, self.inside)
            found = super().embed(texts)
            self.inside -= 1
            return found

    embedder = Counting()
    shared = SharedEmbedder(embedder)
    embedder.open.clear()
    tasks = [(["slow", str(i)],) for i in range(4)]
    threads = [threading.Thread(target=shared.embed, args=task) for task in tasks]
    for thread in threads:
        thread.start()
    assert embedder.waiting.wait(30)
    embedder.open.set()
    for thread in threads:
        thread.join()
    assert embedder.most == 1


def test_the_same_list_of_texts_is_embedded_once():
    embedder = WordEmbedder()
    shared = SharedEmbedder(embedder)
    first = shared.embed(["a", "b"])
    np.testing.assert_array_equal(first, embedder.embed(["a", "b"]))
    embedder.embed = None
    assert shared.embed(("a", "b")) is first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0


@pytest.mark.parametrize(
    "options",
    [{"nprobe": 4}, {"static_weight": 0.5}, {"dynamic_weight": 0.5}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_a_service_that_is_not_there_are_refused(options):
    [name] = options
    with pytest.raises(ValueError, match=rf"\['{name}'\] have no effect"):
        open_services(RetrievalConfig(**options))
