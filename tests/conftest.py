"""Fixtures that several packages' tests share."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from tests.small_data import Data, chosen_map, prepare_plainly

TRAINING_TEXT = [
    "the harbor light of the old town turns slowly over the water",
    "a letter from the north came with the morning boat",
    "counting the stars is a work of patience and of warm coats",
]

SPARK_SETTINGS = """
spark.master                                  local[2,4]
spark.driver.bindAddress                      127.0.0.1
spark.driver.host                             127.0.0.1
spark.ui.enabled                              false
spark.ui.showConsoleProgress                  false
spark.sql.shuffle.partitions                  2
"""


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A small GPT-2-like tokenizer as tokenizer.json and as vocab.json with merges.txt."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken("<|endoftext|>", special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer_url(tokenizer_folder):
    return str(tokenizer_folder / "tokenizer.json")


@pytest.fixture(scope="session")
def data(tokenizer_url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    training, retrieval = prepare_plainly(folder, tokenizer_url)
    return Data(training, retrieval, chosen_map(folder, training, retrieval))


@pytest.fixture(scope="session")
def spark(tmp_path_factory):
    """The one Spark session of a test run: the repository's settings, on two cores and without a
    user interface.
    """
    from etl.spark import CONF_FOLDER, spark_session

    folder = tmp_path_factory.mktemp("spark")
    settings = (CONF_FOLDER / "spark-defaults.conf").read_text()
    (folder / "spark-defaults.conf").write_text(settings + SPARK_SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_CONF_DIR", str(folder))
        session = spark_session("retromill tests")
        yield session
        session.stop()
