"""An index over a small corpus with a real sentence model, and rules of chunks without one."""

import numpy as np
import pytest

from etl.retmmap import Layout
from etl.tokenizer import load_tokenizer
from serving.chunk_rules import ChunkRules
from serving.embedding import open_embedder
from tests.serving.offline import EMBEDDER, make_records, prepare_and_index
from tests.small_data import CHUNK_SIZE


@pytest.fixture(scope="package")
def offline(tokenizer_url, tmp_path_factory):
    return prepare_and_index(tmp_path_factory.mktemp("offline"), tokenizer_url, make_records(40))


@pytest.fixture(scope="package")
def embedder():
    return open_embedder(EMBEDDER)


@pytest.fixture(scope="package")
def rules(tokenizer_url):
    return ChunkRules(load_tokenizer(tokenizer_url), Layout.of(CHUNK_SIZE, np.uint16, True))
