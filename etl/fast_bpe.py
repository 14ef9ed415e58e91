"""Byte-level BPE by tiktoken: several times faster than the `tokenizers` library, used only where
it gives the same ids.

At start-up both encode the same few hundred texts (languages, code, white space, digits, broken
words, random strings); one difference, or a tokenizer of another build, and there is no fast path.
"""

import json
import random
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import Tokenizer

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Without any special token tiktoken looks for an empty one at every character, which halves its
# speed. These two code points are no characters; in a text they are encoded as text.
_NOWHERE = "\U0010fffe\U0010ffff"
_CUT_CHARACTERS = 1 << 20
# Between a letter and a space before a letter every usual pattern ends a word.
_WORD_END = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
_SAMPLES = (
    "The year 1984, I'll say; we've been, they're gone.\n\n\tdef f(x):\n        return x**2\n",
    "Füße, naïve café — ÀÉÎ. Привет, мир! 你好,世界。 こんにちは 안녕하세요 नमस्ते مرحبا שלום",
    "🙂👩‍👩‍👧‍👦🇫🇷 a\u0301 \u200b\ufeff\u00a0 \r\n\r\n \t\t  x   \n   y\n\n\n",
    "<|endoftext|> <|pad|> [PAD] <s> </s> <unk>" + _NOWHERE,
    "AAAAaaaa1111222233334444 ---- ==== //// .... ''s 'S 'LL don't DON'T",
    "\x00\x01\x7f \u0085\u2028\u2029 ſ K Ω ǅ ١٢٣ ½ ²",
)


class FastBPE:
    """Encodes as the tokenizer that it was made from."""

    def __init__(self, tokenizer: Tokenizer, encoding: tiktoken.Encoding, ids: NDArray[np.int32]):
        self._tokenizer, self._encoding = tokenizer, encoding
        self._ids = None if np.array_equal(ids, np.arange(len(ids))) else ids

    @classmethod
    def proved_equal(cls, tokenizer: Tokenizer) -> "FastBPE | None":
        """The fast encoder of a byte-level BPE tokenizer, or None if it has none that is equal."""
        spec = json.loads(tokenizer.to_str())
        pattern, ranked = _pattern(spec), _ranked_pieces(spec)
        if pattern is None or ranked is None:
            return None
        ranks = {piece: rank for rank, (piece, _) in enumerate(ranked)}
        try:
            encoding = tiktoken.Encoding(
                "retromill",
                pat_str=_grouped(pattern),
                mergeable_ranks=ranks,
                special_tokens={_NOWHERE: len(ranks)},
            )
        except ValueError:
            return None
        fast = cls(tokenizer, encoding, np.asarray([i for _, i in ranked], np.int32))
        return fast if fast._is_equal(list(ranks)) else None

    def encode(self, text: str) -> NDArray[np.int32]:
        """Ids [n] of the text."""
        parts = [self._encode(part) for part in _parts(text, _CUT_CHARACTERS)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _encode(self, text: str) -> NDArray[np.int32]:
        try:
            ranks = self._encoding.encode_to_numpy(text, disallowed_special=()).view(np.int32)
        except ValueError:  # the pattern's stack ends on very long runs of white space
            return self._slow(text)
        return ranks if self._ids is None else self._ids[ranks]

    def _slow(self, text: str) -> NDArray[np.int32]:
        [found] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.asarray(found.ids, np.int32)

    def _is_equal(self, pieces: list[bytes]) -> bool:
        for text in _test_texts(pieces):
            whole = self._slow(text)
            cut = [self._encode(part) for part in _parts(text, 10)]
            if not np.array_equal(self._encode(text), whole):
                return False
            if not np.array_equal(np.concatenate(cut), whole):
                return False
        return True


def _parts(text: str, characters: int) -> Iterator[str]:
    """The text in parts of about so many characters, cut where a word ends, so that memory and the
    pattern's work are bounded."""
    start = 0
    while len(text) - start > characters:
        match = _WORD_END.search(text, start + characters)
        if match is None:
            break
        yield text[start : match.start()]
        start = match.start()
    yield text[start:] if start else text


def _test_texts(pieces: list[bytes]) -> Iterator[str]:
    yield from _SAMPLES
    generator = random.Random(0)
    words = [text for piece in pieces if (text := piece.decode("utf-8", "ignore"))]
    alphabet = [chr(i) for i in (*range(32, 127), *range(0xA0, 0x250), *range(0x4E00, 0x4E80))]
    for _ in range(150):
        yield "".join(generator.choices(words, k=40))
        yield "".join(generator.choices(alphabet + list(" \n\t'0") * 40, k=80))


def _pattern(spec: dict[str, Any]) -> str | None:
    """The pattern that cuts text into words; None for a tokenizer of another build."""
    steps = spec["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    plain = not spec["normalizer"] and all(token["special"] for token in spec["added_tokens"])
    if not plain or steps[-1].get("type") != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return GPT2_PATTERN if steps[0]["use_regex"] else None
    split = steps[0]
    is_usual = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    if len(steps) == 2 and is_usual and not steps[1]["use_regex"]:
        return split["pattern"].get("Regex")
    return None


def _grouped(pattern: str) -> str:
    """The same pattern, a third faster: alternatives without look-ahead in a group of their own are
    one automaton; beside one with look-ahead each is tried by itself."""
    plain, look_ahead, rest = pattern.partition(r"|\s+(?!\S)")
    return f"(?:{plain}){look_ahead}{rest}" if look_ahead else pattern


def _ranked_pieces(spec: dict[str, Any]) -> list[tuple[bytes, int]] | None:
    """(bytes, id) of the single bytes and then of the merges' results, in order of merging; None if
    the model is not plain byte-level BPE."""
    model = spec["model"]
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model.get("type") != "BPE" or any(model.get(option) for option in odd):
        return None
    to_byte, vocab = byte_of_character(), model["vocab"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    pieces = dict.fromkeys([*to_byte, *("".join(pair) for pair in merges)])
    if not all(piece in vocab and set(piece) <= to_byte.keys() for piece in pieces):
        return None
    return [(bytes(to_byte[c] for c in piece), vocab[piece]) for piece in pieces]


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether its pieces are bytes, so that they join to the text exactly."""
    spec = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
    return "ByteLevel" in {part["type"] for part in [spec, *spec.get("pretokenizers", [])]}


@lru_cache(maxsize=1)
def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
