import io
import random

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model.text_stream import TextStream

TEXT = "the end of it. Größe, 你好 🙂🙂 and the enders; they end it. " * 3


@pytest.fixture(scope="module")
def byte_level():
    """Bytes that seldom form tokens of whole characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def pieces():
    """SentencePiece: the first token of a text loses its space, rare characters are bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT.encode("ascii", "ignore").decode()] * 20),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def parts(decode, prompt, tokens, stop=()):
    """The text that each token releases, up to the end of the sequence, and at the end."""
    stream = TextStream(decode, prompt, stop)
    found = []
    for token in tokens:
        found.append(stream.push(token))
        if stream.is_stopped:
            break
    return [*found, stream.finish()], stream.is_stopped


def test_released_parts_are_the_text(byte_level, pieces):
    for encode, decode in (
        (lambda text: byte_level.encode(text).ids, byte_level.decode),
        (pieces.encode, lambda ids: pieces.decode(list(ids))),
    ):
        ids = encode(TEXT)
        for cut in (1, 7, 40):
            prompt = decode(ids[:cut])
            if "\ufffd" in prompt:
                continue
            found, is_stopped = parts(decode, ids[:cut], ids[cut:])
            assert "".join(found) == decode(ids)[len(prompt) :]
            assert "\ufffd" not in "".join(found)
            assert not is_stopped
            assert sum(part != "" for part in found) > len(found) / 2


@pytest.mark.parametrize("stop", [("end it",), ("你好", "🙂"), ("z", "s; they"), ("nowhere",)])
def test_text_ends_before_the_first_stop_string_wherever_tokens_end(byte_level, stop):
    ids = byte_level.encode(TEXT).ids
    places = [TEXT.index(s) for s in stop if s in TEXT]
    for tokens in (ids, byte_by_byte(byte_level)):
        found, is_stopped = parts(byte_level.decode, [], tokens, stop)
        assert "".join(found) == TEXT[: min(places, default=len(TEXT))]
        assert is_stopped == bool(places)


def byte_by_byte(byte_level):
    """The same text in tokens of one byte each."""
    return [
        i
        for c in byte_level.pre_tokenizer.pre_tokenize_str(TEXT)
        for x in c[0]
        for i in [byte_level.token_to_id(x)]
    ]


def test_no_part_that_may_become_a_stop_string_is_released():
    letters = random.Random(0)
    for _ in range(300):
        text = "".join(letters.choices("ab", k=12))
        stop = "".join(letters.choices("ab", k=3))
        found, is_stopped = parts("".join, [], list(text), [stop])
        place = text.find(stop)
        assert "".join(found) == (text if place < 0 else text[:place])
        assert is_stopped == (place >= 0)
        for i in range(len(found) - 1 - is_stopped):
            held = text[: i + 1].removeprefix("".join(found[: i + 1]))
            assert held == "" or stop.startswith(held)


def test_bytes_that_make_no_character_are_released_after_a_while(byte_level):
    odd = next(i for i in range(256) if byte_level.decode([i]) == "\ufffd")
    found, _ = parts(byte_level.decode, [], [odd] * 100)
    assert "".join(found) == "\ufffd" * 100
    assert all(any(found[i : i + 17]) for i in range(80))
