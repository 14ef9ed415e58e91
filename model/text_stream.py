"""Text of a growing sequence of tokens, released as soon as it is certain: complete characters that
cannot be the beginning of a stop string.

Any tokenizer behind a function from token ids to text; only the last few tokens are decoded again
for each new one.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_CONTEXT_TOKENS = 8
_MOST_PENDING = 16
_INCOMPLETE = "\ufffd"


class TextStream:
    """Joined, the released parts are the continuation's text up to the first stop string.

    Args:
        decode: Token ids to text, without special tokens; bytes that are no whole character become
            U+FFFD.
        prompt: Tokens before the continuation: what a token means may depend on them, such as
            whether it starts with a space.
        stop: Strings that end the text.

    Attributes:
        is_stopped: Whether a stop string has come.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, stop
        self._tokens = list(prompt[-_CONTEXT_TOKENS:])
        self._context = len(self._tokens)
        self._held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with one more token. Bytes that make no character are waited
        with for a few tokens only."""
        self._tokens.append(token)
        text = self._pending_text()
        is_incomplete = not text or text.endswith(_INCOMPLETE)
        if is_incomplete and len(self._tokens) - self._context < _MOST_PENDING:
            return ""
        self._tokens = self._tokens[self._context :]
        self._context = len(self._tokens)
        return self._release(text, is_last=False)

    def finish(self) -> str:
        """What has been held back."""
        return "" if self.is_stopped else self._release(self._pending_text(), is_last=True)

    def _pending_text(self) -> str:
        before = self._decode(self._tokens[: self._context])
        return self._decode(self._tokens)[len(before) :]

    def _release(self, text: str, is_last: bool) -> str:
        self._held += text
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        self.is_stopped = bool(found)
        end = min(found) if found else len(self._held)
        if not found and not is_last:
            end -= max((_overlap(self._held, stop) for stop in self._stop), default=0)
        released, self._held = self._held[:end], self._held[end:]
        return released


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of the stop string."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
