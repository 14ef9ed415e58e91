"""The tokenizer of a loaded embedder: texts -> TokenRows, and whether a dataset's encoder ids are
what it would make of the dataset's text.

The tokenizer.json that preparation uses is taken here too, once it was seen to agree with what the
model itself does with text; otherwise the model's own preprocessing makes the rows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etl.encoder_ids import EncoderError, EncoderTokenizer, load_encoder_tokenizer
from etl.manifest import Encoder
from indexing.token_rows import TokenRows

_NO_LIMIT = 1 << 20
_TENSORS = {"input_ids", "attention_mask", "token_type_ids"}
_SELF_TEST = (
    "",
    "x",
    " \t\n",
    "The Harbor's light: turned SLOWLY, 3.14159 times!",
    "Größe, naïve café, İstanbul, ΣΊΣΥΦΟΣ, ﬁne Ⅷ ½ e\u0301",
    "東京は日本の首都です。 한국어 文字 ไทย عربى",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 zero\u200bwidth \u00a0nbsp \ufffd\x00\x07",
    "[CLS] [PAD] [MASK] </s> <s> <pad> <unk> <mask> <|endoftext|>",
    "def f(x):\n    return {'a': x[0] ** 2}  # ok\r\n\t" + "A" * 120,
)


class EmbedderTokenizer:
    """Of a SentenceTransformer.

    Attributes:
        extra: Features besides the rows that the model's modules are to be given.
        type_ids: Whether the model is given token_type_ids (all zero).
        pad_id, pads_left: How batches are filled up.
        max_length: Tokens at which a text is cut off.
        empty: The row of a text without any characters: special tokens only.
        encoder: What a dataset's encoder ids must have been made with to stand for its text; None
            if none can.

    Raises:
        ValueError: the model does not work on rows of token ids.
    """

    def __init__(self, model: Any, folder: Path | None) -> None:
        self._model = model
        self._prompt = model.prompts.get(model.default_prompt_name or "", "") or None
        probe = self._preprocess(["x"])
        self.extra = {key: value for key, value in probe.items() if key not in _TENSORS}
        self.type_ids = "token_type_ids" in probe
        _check_probe(probe)
        tokenizer = model.tokenizer
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self.pads_left = tokenizer.padding_side == "left"
        self.max_length = int(min(model.max_seq_length or _NO_LIMIT, _NO_LIMIT))
        self._fast = None if self._prompt else self._agreeing(folder)
        self.empty = self._lists([""])[0]
        self.encoder = self._encoder()

    @property
    def concurrent(self) -> bool:
        """Whether several threads may call `rows` at once."""
        return self._fast is not None

    @property
    def identity(self) -> Any:
        """What the rows of a text depend on, for fingerprints."""
        if self._fast is not None:
            return self._fast.facts.fingerprint
        backend = getattr(self._model.tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend else sorted(self._model.tokenizer.get_vocab().items())
        return [content, self._prompt, self.max_length]

    def rows(self, texts: Sequence[str]) -> TokenRows:
        """The ids of each text, special tokens included, cut off at max_length."""
        return TokenRows.from_lists(self._lists(texts))

    def fits(self, encoder: Encoder | None) -> bool:
        """Whether ids made with `encoder` are those that `rows` makes of the same texts."""
        if encoder is None or self.encoder is None:
            return False
        return (encoder.fingerprint, encoder.max_length, encoder.pad_id) == (
            self.encoder.fingerprint,
            self.encoder.max_length,
            self.encoder.pad_id,
        )

    def _lists(self, texts: Sequence[str]) -> list[list[int]]:
        if self._fast is not None:
            return self._fast.encode(texts)
        features = self._preprocess(list(texts))
        return [
            ids[mask.bool()].tolist()
            for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True)
        ]

    def _preprocess(self, texts: list[str]) -> dict[str, Any]:
        return dict(self._model.preprocess(texts, prompt=self._prompt))

    def _agreeing(self, folder: Path | None) -> EncoderTokenizer | None:
        """The model's tokenizer.json, if it gives the ids that the model itself computes with."""
        try:
            found = load_encoder_tokenizer(str(folder)) if folder else None
        except EncoderError:
            return None
        if found is None:
            return None
        fast = EncoderTokenizer(found.name, found.tokenizer_json, self.max_length)
        self._fast = None
        texts = [*_SELF_TEST, "word, " * min(2 * self.max_length, 1 << 14)]
        return fast if fast.encode(texts) == self._lists(texts) else None

    def _encoder(self) -> Encoder | None:
        """Stored rows are filled up with the pad id, so no row may end with it."""
        if self._fast is None or not self.empty or len(self._lists(["x"])[0]) <= len(self.empty):
            return None
        suffix = self.empty[-1]
        facts = self._fast.facts
        ends = all(row[-1] == suffix for row in self._lists(["x", "word, " * 600]))
        return facts if ends and suffix != facts.pad_id else None


def _check_probe(probe: dict[str, Any]) -> None:
    if not {"input_ids", "attention_mask"} <= probe.keys() or probe["input_ids"].ndim != 2:
        raise ValueError(
            f"its first module makes {sorted(probe)} of a text; expected input_ids and "
            "attention_mask, as a transformer takes them"
        )
    if "token_type_ids" in probe and probe["token_type_ids"].any():
        raise ValueError("it wants token_type_ids other than 0, which rows of ids do not carry")
