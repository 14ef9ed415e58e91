"""A generated text as the page shows it: cut where something was retrieved, each piece beside the
neighbors that take part in its prediction.

    prompt tokens, TokenEvents -> pieces -> HTML

All text is escaped: prompt, generated text and neighbors are other people's.
"""

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from etl.tokenizer import TextTokenizer
from model.active_sequence import Retrieval
from model.decoding import TokenEvent
from model.retriever import Neighbor
from serving.page_markup import counted, escaped

SHORTEST_OVERLAP = 3

_WORD = re.compile(r"\w+")


@dataclass
class Piece:
    """Tokens in a row with the same neighbors.

    Attributes:
        retrieval: None: nothing was retrieved for these tokens.
        prompt: Text of those that are the prompt's.
        generated: Text of the others.
    """

    retrieval: Retrieval | None
    prompt: str = ""
    generated: str = ""

    @property
    def text(self) -> str:
        return self.prompt + self.generated


class Transcript:
    """Grows with the events of one sequence.

    Attributes:
        num_generated: Tokens so far.
        finish_reason: Of the last one, if it is.

    Args:
        tokenizer: The model's.
        prompt: Token ids.
        chunk_size: Neighbors take part in the prediction of as many tokens; None: nothing is
            retrieved.
    """

    def __init__(
        self, tokenizer: TextTokenizer, prompt: Sequence[int], chunk_size: int | None
    ) -> None:
        self._bytes, self._prompt, self._chunk_size = tokenizer.token_bytes, prompt, chunk_size
        self.pieces = [Piece(None)]
        self.num_generated = 0
        self.finish_reason: str | None = None
        self._drawn: list[str] = []

    def add(self, event: TokenEvent) -> None:
        """One more token; the first one brings the retrievals of the prompt."""
        pending = list(event.retrievals)
        if not self.num_generated:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            for i, token in enumerate(self._prompt):
                self._piece_of(i, pending).prompt += decoder.decode(self._bytes[token])
        self._piece_of(len(self._prompt) + self.num_generated, pending).generated += event.text
        self.num_generated += 1
        self.finish_reason = event.finish_reason

    def html(self) -> str:
        """Pieces that can change no more are not drawn again."""
        last = len(self.pieces) - 1
        while len(self._drawn) < last:
            self._drawn.append(self._draw(len(self._drawn)))
        return f'<div class="rm-transcript">{"".join(self._drawn)}{self._draw(last)}</div>'

    @property
    def summary(self) -> str:
        """What it has come to."""
        retrievals = sum(piece.retrieval is not None for piece in self.pieces)
        return f"{counted(self.num_generated, 'token')}, {counted(retrievals, 'retrieval')}"

    def _piece_of(self, position: int, pending: list[Retrieval]) -> Piece:
        """The piece of token `position` of the sequence; positions come in order.

        Args:
            pending: Retrievals without a piece; those that have one now are taken out.
        """
        while pending and pending[0].position < position:
            self.pieces.append(Piece(pending.pop(0)))
        retrieval, reach = self.pieces[-1].retrieval, self._chunk_size or 0
        if retrieval is not None and position > retrieval.position + reach:
            self.pieces.append(Piece(None))
        return self.pieces[-1]

    def _draw(self, index: int) -> str:
        piece = self.pieces[index]
        before = self.pieces[index - 1].text if index else ""
        if piece.retrieval is None and not piece.text:
            return ""
        prompt = piece.prompt.lstrip(" ")
        generated = piece.generated if prompt else piece.generated.lstrip(" ")
        text = (
            f'<div class="rm-text"><span class="rm-prompt">{escaped(prompt)}</span>'
            f'<span class="rm-generated">{escaped(generated)}</span></div>'
        )
        if piece.retrieval is None:
            return f'<section class="rm-piece rm-alone">{text}</section>'
        neighbors = _draw_neighbors(piece.retrieval, [before, piece.text])
        return f'<section class="rm-piece">{text}{neighbors}</section>'


def marked(text: str, others: Sequence[str]) -> str:
    """HTML of a text, with the longest run of words that stands in one of the others too in
    <mark>, if it has SHORTEST_OVERLAP words. Case and what is between words do not count."""
    spans = [match.span() for match in _WORD.finditer(text)]
    words = _words(text)
    runs = [
        SequenceMatcher(None, words, own, autojunk=False).find_longest_match()
        for own in map(_words, others)
    ]
    best = max(runs, key=lambda run: run.size, default=None)
    if best is None or best.size < SHORTEST_OVERLAP:
        return escaped(text)
    start, end = spans[best.a][0], spans[best.a + best.size - 1][1]
    inside = f"<mark>{escaped(text[start:end])}</mark>"
    return escaped(text[:start]) + inside + escaped(text[end:])


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]


def _draw_neighbors(retrieval: Retrieval, texts: Sequence[str]) -> str:
    cards = "".join(_draw_neighbor(neighbor, texts) for neighbor in retrieval.neighbors)
    found = counted(len(retrieval.neighbors), "neighbor")
    caption = f'<p class="rm-caption">after token {retrieval.position}: {found}</p>'
    return f'<div class="rm-neighbors">{caption}{cards}</div>'


def _draw_neighbor(neighbor: Neighbor, texts: Sequence[str]) -> str:
    return (
        '<article class="rm-card"><header>'
        f'<b class="rm-source">{escaped(neighbor.source)}</b>'
        f'<span class="rm-badge">{escaped(neighbor.service)}</span>'
        f'<span class="rm-score" title="inner product of the embeddings">'
        f"{neighbor.score:.3f}</span></header>"
        f'<div class="rm-chunk">{marked(neighbor.text.lstrip(), texts)}</div></article>'
    )
