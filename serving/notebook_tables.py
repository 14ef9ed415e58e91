"""Chunks beside their neighbors as HTML tables for notebooks: source, score, and what both have in
common. All text is escaped.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate, pairwise
from typing import Any

from markupsafe import Markup, escape

from etl.tokenizer import TextTokenizer
from model.retriever import Neighbor
from serving.chunk_rules import ChunkRules

LEAST_MARKED = 4
"""Tokens in common from which on they are marked; fewer are in common by chance."""

_CELL = "text-align:left;vertical-align:top;padding:.3em .7em;border-top:1px solid #d8dee6"
_TEXT = "white-space:pre-wrap;overflow-wrap:break-word;max-width:46em;max-height:20em;overflow:auto"
_TABLE = "font-size:90%;margin:0 0 1.5em;border-collapse:collapse"
_MARK = "background:#ffe08a;color:#1c2430"
_CONTINUATION = "opacity:.62"


@dataclass(frozen=True)
class CommonRun:
    """The longest run of tokens that two rows share, and where it starts in either."""

    start: int
    other_start: int
    length: int


def common_run(tokens: Sequence[int], others: Sequence[int], pad_id: int) -> CommonRun:
    """Of all longest ones the first. Pads are common to nobody."""
    left = [None if token == pad_id else token for token in tokens]
    right = [-1 if token == pad_id else token for token in others]
    found = SequenceMatcher(None, left, right, autojunk=False).find_longest_match()
    return CommonRun(found.a, found.b, found.size)


def marked_text(
    tokenizer: TextTokenizer, tokens: Sequence[int], marked: range, chunk_size: int
) -> Markup:
    """Text of tokens as HTML: those at the places `marked` stand out, those of the continuation
    (from chunk_size on) are paler. A character of several tokens belongs to the first of them."""
    pieces = [tokenizer.token_bytes[token] for token in tokens]
    data, ends = b"".join(pieces), [0, *accumulate(map(len, pieces))]
    places = sorted({0, marked.start, marked.stop, min(chunk_size, len(tokens)), len(tokens)})
    parts = []
    for first, stop in pairwise(places):
        piece = data[_character(data, ends[first]) : _character(data, ends[stop])]
        text = escape(piece.decode(errors="replace"))
        if first in marked:
            text = Markup(f'<mark style="{_MARK}">{text}</mark>')
        if first >= chunk_size:
            text = Markup(f'<span style="{_CONTINUATION}">{text}</span>')
        parts.append(text)
    return Markup("").join(parts)


def _character(data: bytes, place: int) -> int:
    """The first start of a character at or behind a place, but for broken ones at the edges."""
    while 0 < place < len(data) and data[place] & 0xC0 == 0x80:
        place += 1
    return place


def neighbor_table(
    rules: ChunkRules,
    title: str,
    tokens: Sequence[int],
    neighbors: Sequence[Neighbor],
    neighbor_tokens: Sequence[Sequence[int]],
) -> Markup:
    """A text's tokens, and below it a row for each neighbor, best first.

    Args:
        neighbor_tokens: [>= number of neighbors, 2 chunk_size] chunk and continuation.
    """
    tokenizer, pad_id, size = rules.tokenizer, rules.pad_id, rules.chunk_size
    runs = [common_run(tokens, others, pad_id) for others in neighbor_tokens[: len(neighbors)]]
    longest = max(runs, key=lambda run: run.length, default=CommonRun(0, 0, 0))
    own = marked_text(tokenizer, tokens, _marked(longest.start, longest), len(tokens))
    rows: list[list[Any]] = [["", title, "", own]]
    for neighbor, run, others in zip(neighbors, runs, neighbor_tokens):
        text = marked_text(tokenizer, others, _marked(run.other_start, run), size)
        source = f"{neighbor.source}\nchunk {neighbor.id}"
        rows.append([f"{neighbor.score:.3f}", source, run.length, text])
    if not neighbors:
        rows.append(["–", "no neighbor", "", ""])
    return text_table(["score", "source", "tokens in common", "text"], rows)


def _marked(start: int, run: CommonRun) -> range:
    return range(start, start + run.length) if run.length >= LEAST_MARKED else range(0)


def text_table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> Markup:
    """A table whose texts keep their line breaks. Cells that are no Markup are escaped.

    Args:
        columns: Its head; empty: none.
    """
    head = _joined(Markup('<th style="{}">{}</th>').format(_CELL, name) for name in columns)
    body = _joined(Markup("<tr>{}</tr>").format(_joined(map(_cell, row))) for row in rows)
    return Markup('<table style="{}"><tr>{}</tr>{}</table>').format(_TABLE, head, body)


def _joined(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def _cell(value: Any) -> Markup:
    return Markup('<td style="{}"><div style="{}">{}</div></td>').format(
        _CELL, _TEXT, _readable(value)
    )


def _readable(value: Any) -> Any:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
