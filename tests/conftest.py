"""Fixtures that several packages' tests share."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

TRAINING_TEXT = [
    "the harbor light of the old town turns slowly over the water",
    "a letter from the north came with the morning boat",
    "counting the stars is a work of patience and of warm coats",
]


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
