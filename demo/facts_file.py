"""A file of facts with the entropy of its answers: what a model without retrieval can reach at best
on the held-out ones, counted in tokens of the tokenizer that prepares the file."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import orjson

from demo.facts import ANSWER_PATTERN, guess_entropy
from etl.storage import write_atomically
from etl.tokenizer import TextTokenizer

_ANSWER = re.compile(ANSWER_PATTERN.encode())


@dataclass
class Questions:
    """Counts of a split's question documents.

    Attributes:
        places: Documents, one a place.
        answer_tokens: Tokens that jobs.evaluate scores with ANSWER_PATTERN.
    """

    places: int = 0
    answer_tokens: int = 0

    def add(self, text: str, tokenizer: TextTokenizer) -> None:
        self.places += 1
        self.answer_tokens += _answer_tokens(text, tokenizer)

    def summary(self) -> dict[str, Any]:
        """With `entropy`: nats an answer token, the mean loss of the best guess."""
        entropy = self.places * guess_entropy() / self.answer_tokens
        return {"places": self.places, "answer_tokens": self.answer_tokens, "entropy": entropy}


def _answer_tokens(text: str, tokenizer: TextTokenizer) -> int:
    """Tokens with a byte of an answer."""
    ends = np.cumsum(tokenizer.encode_batch([text])[0].byte_lengths)
    starts = np.concatenate([[0], ends[:-1]])
    spans = [match.span(1) for match in _ANSWER.finditer(text.encode())]
    return sum(int(((starts < stop) & (ends > start)).sum()) for start, stop in spans)


def write_facts_file(
    url: str, facts: Iterable[dict[str, Any]], tokenizer: TextTokenizer
) -> dict[str, dict[str, Any]]:
    """Writes the records of `make_facts` as loose JSON, at once or not at all; summaries of the
    questions by split."""
    questions: dict[str, Questions] = {}

    def write(file: BinaryIO) -> None:
        for record in facts:
            file.write(orjson.dumps(record) + b"\n")
            if record["split"] != "retrieval":
                counts = questions.setdefault(record["split"], Questions())
                counts.add(record["text"], tokenizer)

    write_atomically(url, write)
    return {split: counts.summary() for split, counts in questions.items()}
