"""generate | `python -m jobs.generate` | torch | reads a run's checkpoint, the index and its
retrieval dataset | prints a text, and the neighbors it was written with.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from etl.dataset import Dataset
from indexing.embedder import EmbedderConfig
from indexing.embeddings import dataset_tokenizer
from jobs.command_line import run_job
from model.checkpoint import check_tokenizer, load_model, require_checkpoint
from model.generation import GenerateConfig, Retrieval, generate
from serving.retrieval import LocalRetriever


@dataclass(frozen=True)
class GenerateJobConfig:
    """Continues a prompt, retrieving whenever a chunk completes.

    Attributes:
        run_url: Folder of the jobs.pretrain run.
        prompt: The text to continue.
        retrieval_url: Folder of the retrieval dataset; also tells the tokenizer.
        index_url: Folder of the index over it; none: generate with retrieval off.
        embedder: The embedder of the index.
        neighbors: Neighbors of each chunk.
        generation: How to choose tokens.
    """

    run_url: str
    prompt: str
    retrieval_url: str
    index_url: str | None = None
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    neighbors: int = 2
    generation: GenerateConfig = field(default_factory=GenerateConfig)


def run(config: GenerateJobConfig) -> dict[str, Any]:
    dataset = Dataset(config.retrieval_url)
    tokenizer = dataset_tokenizer(dataset)
    check_tokenizer(require_checkpoint(config.run_url), dataset.manifest)
    model = load_model(config.run_url)
    retriever = None
    if config.index_url is not None:
        retriever = LocalRetriever(
            config.index_url, config.retrieval_url, config.embedder, config.neighbors
        )
    [prompt] = tokenizer.encode_batch([config.prompt])
    found = generate(model, prompt.ids.tolist(), config.generation, retriever)
    texts = tokenizer.decode_batch(np.asarray([found.tokens[found.prompt_tokens :]]))
    return {
        "prompt": config.prompt,
        "text": texts[0],
        "tokens": len(found.tokens) - found.prompt_tokens,
        "retrievals": [_shown(retrieval, dataset, tokenizer) for retrieval in found.retrievals],
    }


def _shown(retrieval: Retrieval, dataset: Dataset, tokenizer: Any) -> dict[str, Any]:
    chunks = dataset.get_chunk(retrieval.neighbor_ids) if retrieval.neighbor_ids else []
    texts = tokenizer.decode_batch(chunks) if len(chunks) else []
    neighbors = zip(retrieval.neighbor_ids, texts, strict=True)
    return {
        "visible_from_token": retrieval.position,
        "neighbors": [{"chunk_id": i, "text": text} for i, text in neighbors],
    }


if __name__ == "__main__":
    run_job("Generate text with live retrieval.", GenerateJobConfig, run)
