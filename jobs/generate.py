"""generate | `python -m jobs.generate` | torch | reads a run's checkpoint, the index and its
retrieval dataset | prints a text, and the neighbors it was written with.
"""

from dataclasses import dataclass, field
from typing import Any

from etl.dataset import Dataset
from indexing.embedder import EmbedderConfig
from indexing.embeddings import dataset_tokenizer
from jobs.command_line import run_job
from model.active_sequence import Retrieval
from model.checkpoint import check_tokenizer, load_model, require_checkpoint
from model.generation import GenerateConfig, generate
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
        generation: How to choose tokens, and how many neighbors to retrieve.
    """

    run_url: str
    prompt: str
    retrieval_url: str
    index_url: str | None = None
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    generation: GenerateConfig = field(default_factory=GenerateConfig)


def run(config: GenerateJobConfig) -> dict[str, Any]:
    dataset = Dataset(config.retrieval_url)
    tokenizer = dataset_tokenizer(dataset)
    check_tokenizer(require_checkpoint(config.run_url), dataset.manifest)
    model = load_model(config.run_url)
    retriever = None
    if config.index_url is not None:
        retriever = LocalRetriever(config.index_url, config.retrieval_url, config.embedder)
    [prompt] = tokenizer.encode_batch([config.prompt])
    prompts, pad = [prompt.ids.tolist()], dataset.manifest.pad_id
    [found] = generate(model, prompts, config.generation, retriever, tokenizer.decode, pad)
    return {
        "prompt": config.prompt,
        "text": found.text,
        "tokens": len(found.tokens) - found.prompt_tokens,
        "finish_reason": found.finish_reason,
        "retrievals": [_shown(retrieval) for retrieval in found.retrievals],
    }


def _shown(retrieval: Retrieval) -> dict[str, Any]:
    return {
        "visible_from_token": retrieval.position,
        "neighbors": [
            {"chunk_id": n.id, "text": n.text, "source": n.source, "score": n.score}
            for n in retrieval.neighbors
        ],
    }


if __name__ == "__main__":
    run_job("Generate text with live retrieval.", GenerateJobConfig, run)
