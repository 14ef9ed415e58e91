import random

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from etl.fast_bpe import FastBPE, _parts
from etl.huggingface_tokenizer import HuggingFaceTokenizer

EOD = AddedToken("<|endoftext|>", special=True, normalized=False)
LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(pre_tokenizer, words=400):
    generator = random.Random(1)
    syllables = ["ka", "lo", "mi", "tu", "ra", "sen", "é", "ß", "日", "12", "3", ".", "\n  "]
    texts = [" ".join("".join(generator.choices(syllables, k=3)) for _ in range(words))] * 3
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def gpt2_like():
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama_like():
    split = pre_tokenizers.Split(Regex(LLAMA_PATTERN), "isolated")
    return trained(
        pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    )


def strings(count=300):
    generator = random.Random(9)
    alphabet = [
        *"abzéß日本 \n\t\r'.,0123456789<|>",
        "\u00a0",
        "\U0001f600",
        "\u0301",
        "\x00",
        "\u2028",
    ]
    for _ in range(count):
        yield "".join(generator.choices(alphabet, k=generator.randrange(1, 200)))


@pytest.mark.parametrize("make", [gpt2_like, llama_like])
def test_fast_ids_are_those_of_the_library(make):
    tokenizer = HuggingFaceTokenizer(make())
    assert tokenizer.fast is not None
    for text in strings():
        assert tokenizer.fast.encode(text).tolist() == tokenizer.fast._slow(text).tolist()


def test_long_texts_are_cut_without_changing_their_ids():
    tokenizer = HuggingFaceTokenizer(gpt2_like())
    assert tokenizer.fast is not None
    text = "kalo mitu, rasen 12\n" * 90_000
    assert len(list(_parts(text, 1 << 20))) > 1
    assert "".join(_parts(text, 1 << 20)) == text
    [encoded] = tokenizer.encode_batch([text])
    assert np.array_equal(encoded.ids, tokenizer.fast._slow(text))
    assert encoded.byte_lengths.sum() == len(text.encode())


@pytest.mark.parametrize(
    "text", [" " * 300_000, "\n" * 300_000, "a" * 300_000, "x" + "\u00a0 " * 90_000]
)
def test_runs_that_end_the_pattern_are_encoded_all_the_same(text):
    tokenizer = HuggingFaceTokenizer(gpt2_like())
    assert tokenizer.fast is not None
    assert np.array_equal(tokenizer.encode_batch([text])[0].ids, tokenizer.fast._slow(text))


def with_normalizer():
    tokenizer = gpt2_like()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def with_prefix_space():
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=True))


def with_another_step():
    return trained(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    )


@pytest.mark.parametrize("make", [with_normalizer, with_prefix_space, with_another_step])
def test_other_builds_have_no_fast_path_and_still_encode(make):
    raw = make()
    tokenizer = HuggingFaceTokenizer(make())
    assert tokenizer.fast is None
    for text, encoded in zip(strings(20), tokenizer.encode_batch(list(strings(20))), strict=True):
        assert encoded.ids.tolist() == raw.encode(text, add_special_tokens=False).ids


def test_a_pattern_that_differs_is_found_out(monkeypatch):
    monkeypatch.setattr("etl.fast_bpe.GPT2_PATTERN", r"\p{L}+|\s+|[^\s\p{L}]+")
    assert FastBPE.proved_equal(gpt2_like()) is None
