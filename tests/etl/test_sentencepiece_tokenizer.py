import io

import numpy as np
import pytest
import sentencepiece

from etl.tokenizer import TokenizerError, load_tokenizer, restore_tokenizer

LINES = [
    "the harbor light turns over the water",
    "a letter came with the boat",
    "stars at night",
] * 40


def train(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=330,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def model():
    return train()


def test_text_and_its_bytes_survive(model):
    tokenizer = restore_tokenizer(model)
    text = "the light, \U0001f600 naïve"
    [encoded] = tokenizer.encode_batch([text])
    assert encoded.byte_lengths.sum() == len(text.encode())
    padded = np.append(encoded.ids, [tokenizer.eod_id, tokenizer.pad_id])
    assert tokenizer.decode_batch(padded[None]) == [text]
    assert b"".join(tokenizer.token_bytes[i] for i in padded).decode().strip() == text


def test_special_token_strings_in_text_stay_text(model):
    tokenizer = restore_tokenizer(model)
    [encoded] = tokenizer.encode_batch(["the </s> light"])
    assert not {tokenizer.eod_id, tokenizer.pad_id} & set(encoded.ids.tolist())


def test_a_missing_pad_id_comes_after_the_pieces_and_an_own_one_is_used(model):
    added, own = restore_tokenizer(model), restore_tokenizer(train(pad_id=3))
    assert added.has_added_pad
    assert added.pad_id == added.vocab_size - 1
    assert not own.has_added_pad
    assert own.pad_id == 3


def test_files_and_folders_load_the_same_and_wrong_ones_are_named(model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model)
    folder, file = load_tokenizer(str(tmp_path)), load_tokenizer(str(tmp_path / "tokenizer.model"))
    assert folder.fingerprint == file.fingerprint == restore_tokenizer(model).fingerprint
    assert restore_tokenizer(folder.to_bytes()).fingerprint == folder.fingerprint
    with pytest.raises(TokenizerError, match="'<none>'"):
        restore_tokenizer(model, "<none>")
    (tmp_path / "broken.model").write_bytes(b"broken")
    with pytest.raises(TokenizerError, match=r"broken\.model"):
        load_tokenizer(str(tmp_path / "broken.model"))
    with pytest.raises(TokenizerError, match="no end-of-document"):
        restore_tokenizer(train(eos_id=-1))
