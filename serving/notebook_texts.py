"""Text that a trained model writes with retrieval on and off, beside the neighbors it was shown:
for notebooks that judge a training run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from etl.dataset import Dataset
from indexing.embeddings import chunk_texts, dataset_tokenizer
from model.generation import GenerateConfig, Generation, generate
from model.retro import Retro
from serving.notebook_tables import neighbor_table, text_table
from serving.retrieval import LocalRetriever


@dataclass(frozen=True)
class Continuation:
    """A prompt continued with retrieval on and off, and a table of both with the neighbors."""

    prompt: str
    on: Generation
    off: Generation
    table: Markup


def document_starts(dataset: Dataset, count: int) -> list[str]:
    """The first chunks of documents, evenly spread over the dataset."""
    firsts = dataset.document_first_chunk[:-1]
    chosen = firsts[np.linspace(0, len(firsts) - 1, min(count, len(firsts))).astype(np.int64)]
    return chunk_texts(dataset.get_chunk(chosen, continuation=False), dataset_tokenizer(dataset))


def continuations(
    model: Retro, prompts: Sequence[str], config: GenerateConfig, retriever: LocalRetriever
) -> list[Continuation]:
    """Every prompt continued with the retriever, and without.

    Raises:
        GenerationError: a prompt without text, or options that do not fit the model.
    """
    rules = retriever.rules
    decode = rules.tokenizer.decode
    ids = [encoded.ids.tolist() for encoded in rules.tokenizer.encode_batch(list(prompts))]
    on, off = (
        generate(model, ids, config, service, decode, rules.pad_id) for service in (retriever, None)
    )
    return [
        Continuation(prompt, *pair, _table(prompt, *pair, retriever))
        for prompt, pair in zip(prompts, zip(on, off, strict=True), strict=True)
    ]


def _table(prompt: str, on: Generation, off: Generation, retriever: LocalRetriever) -> Markup:
    rows = [("prompt", prompt), ("retrieval on", on.text), ("retrieval off", off.text)]
    tables = [text_table(["", "text"], rows)]
    # A neighbor that was retrieved for several chunks is shown once.
    seen = {n.id: n for retrieval in on.retrievals for n in retrieval.neighbors}
    best = sorted(seen.values(), key=lambda neighbor: -neighbor.score)
    tokens = retriever.chunks_with_continuations(np.asarray([n.id for n in best], np.int64))
    tables.append(neighbor_table(retriever.rules, "the text", on.tokens, best, tokens.tolist()))
    return Markup("").join(tables)
