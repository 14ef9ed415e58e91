"""facts | `python -m jobs.make_facts` | one process | reads a tokenizer | writes loose JSON of
invented facts, and the entropy of their answers.
"""

from dataclasses import dataclass
from typing import Any

from demo.facts import ANSWER_PATTERN, Style, fills_chunk, make_facts
from demo.facts_file import write_facts_file
from etl.tokenizer import load_tokenizer
from jobs.command_line import run_job


@dataclass(frozen=True)
class MakeFactsConfig:
    """Writes a corpus of random attributes: stated in documents of the retrieval dataset, asked for
    in documents of the others. Without retrieval no model can have a lower loss on the answers than
    their entropy; with it the loss can be near 0. To be prepared with split_key split.

    Attributes:
        output_url: The file to write; one that is there is replaced.
        tokenizer_url: The tokenizer that the file will be prepared with.
        chunk_size: Tokens of a chunk, as in preparation: the first one names the place.
        train: Places asked about in the training dataset.
        validation: Places asked about in the validation dataset, and in no other.
        test: Places asked about in the test dataset, and in no other.
        style: sentences is varied English; pairs states little more than attributes and values, so
            that a small model learns in seconds to look them up.
        seed: Of everything random.
    """

    output_url: str
    tokenizer_url: str
    chunk_size: int = 64
    train: int = 2000
    validation: int = 0
    test: int = 200
    style: Style = "sentences"
    seed: int = 0


def run(config: MakeFactsConfig) -> dict[str, Any]:
    tokenizer = load_tokenizer(config.tokenizer_url)
    counts = (config.train, config.validation, config.test)
    is_chunk = fills_chunk(tokenizer, config.chunk_size)
    facts = make_facts(*counts, is_chunk, config.seed, config.style)
    return {
        "output_url": config.output_url,
        "answer_pattern": ANSWER_PATTERN,
        "splits": write_facts_file(config.output_url, facts, tokenizer),
    }


if __name__ == "__main__":
    run_job("Write a corpus of facts whose entropy is known.", MakeFactsConfig, run)
