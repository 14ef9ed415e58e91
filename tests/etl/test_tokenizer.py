import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from etl.huggingface_tokenizer import HuggingFaceTokenizer
from etl.tokenizer import EOD_TOKENS, PAD_TOKEN, TokenizerError, load_tokenizer

EOD_TOKEN = EOD_TOKENS[0]

TEXTS = ["the harbor light", "naïve \U0001f600 text\n\n  indented", "\x00\x7f", "日本語", "a" * 300]


def ids_of(tokenizer, texts):
    return [encoded.ids.tolist() for encoded in tokenizer.encode_batch(texts)]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_url):
    return load_tokenizer(tokenizer_url)


def test_all_three_ways_of_storing_load_the_same_tokenizer(tokenizer_folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer_folder / name, tmp_path)
    gpt2, folder, file = (
        load_tokenizer(str(url))
        for url in (tmp_path, tokenizer_folder, tokenizer_folder / "tokenizer.json")
    )
    assert folder.fingerprint == file.fingerprint
    expected = ids_of(folder, TEXTS)
    for other in (gpt2, file):
        assert ids_of(other, TEXTS) == expected
        assert (other.pad_id, other.eod_id, other.vocab_size) == (
            *(folder.pad_id, folder.eod_id),
            folder.vocab_size,
        )


def test_a_missing_pad_token_is_added_after_the_vocabulary(tokenizer_folder, tokenizer):
    before = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert before.token_to_id(PAD_TOKEN) is None
    assert tokenizer.pad_id == before.get_vocab_size()
    assert tokenizer.vocab_size == before.get_vocab_size() + 1
    assert tokenizer.pad_id != tokenizer.eod_id


def test_writing_and_loading_changes_nothing(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.to_bytes())
    again = load_tokenizer(str(tmp_path))
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.pad_id, again.vocab_size) == (tokenizer.pad_id, tokenizer.vocab_size)


def test_special_token_strings_in_text_stay_text(tokenizer):
    texts = [f"before {EOD_TOKEN} after", EOD_TOKEN, PAD_TOKEN, f"{EOD_TOKEN}{PAD_TOKEN}"]
    for text, ids in zip(texts, ids_of(tokenizer, texts), strict=True):
        assert not {tokenizer.eod_id, tokenizer.pad_id} & set(ids)
        assert tokenizer.decode_batch(np.asarray([ids])) == [text]


def test_text_survives_encoding_and_so_do_its_bytes(tokenizer):
    for text, ids in zip(TEXTS, ids_of(tokenizer, TEXTS), strict=True):
        assert tokenizer.decode_batch(np.asarray([ids])) == [text]
        assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()
    for text, encoded in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        lengths = [len(tokenizer.token_bytes[i]) for i in encoded.ids]
        assert encoded.byte_lengths.tolist() == lengths
        assert sum(lengths) == len(text.encode())


def test_decoding_drops_special_tokens(tokenizer):
    [ids] = ids_of(tokenizer, ["the light"])
    row = [*ids, tokenizer.eod_id, tokenizer.pad_id, tokenizer.pad_id]
    assert tokenizer.decode_batch(np.asarray([row])) == ["the light"]
    assert tokenizer.token_bytes[tokenizer.eod_id] == b""
    assert tokenizer.token_bytes[tokenizer.pad_id] == b""


def test_settings_of_the_file_do_not_cut_or_pad_texts(tokenizer_folder, tokenizer):
    stored = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    stored.enable_truncation(3)
    stored.enable_padding(length=50)
    assert ids_of(HuggingFaceTokenizer(stored), TEXTS) == ids_of(tokenizer, TEXTS)


def test_another_end_of_document_token_is_another_tokenizer(tokenizer_folder, tokenizer):
    stored = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    stored.add_special_tokens(["</s>"])
    other = HuggingFaceTokenizer(stored, "</s>")
    assert other.eod_id == stored.token_to_id("</s>")
    assert other.fingerprint != tokenizer.fingerprint


def test_tokenizers_that_cannot_be_used_are_refused(tokenizer_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        load_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(TokenizerError, match="no end-of-document token '</s>'"):
        load_tokenizer(str(tokenizer_folder), "</s>")
    with pytest.raises(TokenizerError, match="no end-of-document"):
        HuggingFaceTokenizer(Tokenizer(BPE()))
    with pytest.raises(TokenizerError, match="need_pad_id is false"):
        load_tokenizer(str(tokenizer_folder), need_pad_id=False)


def test_broken_files_are_named(tokenizer_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "gpt2").mkdir()
    shutil.copy(tokenizer_folder / "merges.txt", tmp_path / "gpt2")
    (tmp_path / "gpt2" / "vocab.json").write_text(json.dumps({"a": 0, EOD_TOKEN: 1}))
    with pytest.raises(TokenizerError, match="do not fit together"):
        load_tokenizer(str(tmp_path / "gpt2"))
