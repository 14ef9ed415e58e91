import numpy as np
import pytest
import torch

from model.generation import GenerateConfig, GenerationError, choose_token, generate
from tests.model.test_causality import EOD, VOCABULARY, K, M, tiny


class Fixed:
    """Answers with neighbors that depend on the chunk, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def retrieve(self, chunks):
        self.asked += chunks.tolist()
        ids = chunks[:, :K] % 5
        tokens = np.tile(chunks % (VOCABULARY - 2) + 2, (1, 2))[:, None].repeat(K, axis=1)
        return ids, tokens, np.ones_like(tokens, dtype=bool)


PROMPT = [2, 3, 4, 5, 6, 7]


def test_every_completed_chunk_is_retrieved_once_and_reported():
    retriever = Fixed()
    found = generate(tiny(), PROMPT, GenerateConfig(max_new_tokens=9), retriever)
    complete = (len(found.tokens) - 1) // M
    assert retriever.asked == [found.tokens[u * M : u * M + M] for u in range(complete)]
    assert [r.position for r in found.retrievals] == [u * M + M - 1 for u in range(complete)]
    assert found.tokens[: found.prompt_tokens] == PROMPT


def test_each_token_is_the_models_choice_given_all_neighbors_so_far():
    model, retriever = tiny(), Fixed()
    found = generate(model, PROMPT, GenerateConfig(max_new_tokens=9), retriever)
    stream = np.asarray(found.tokens)
    whole = len(stream) // M
    _, tokens, mask = Fixed().retrieve(stream[: whole * M].reshape(-1, M))
    row = torch.from_numpy(stream)[None]
    logits = model(
        row,
        torch.ones_like(row).bool(),
        torch.from_numpy(tokens)[None],
        torch.from_numpy(mask)[None],
    )
    expected = logits[0, found.prompt_tokens - 1 : -1].argmax(-1)
    assert found.tokens[found.prompt_tokens :] == expected.tolist()


def test_generation_ends_with_the_document():
    model = tiny()
    with torch.no_grad():
        model.head.bias[EOD] = 1e6
    assert generate(model, PROMPT, GenerateConfig(), None).tokens == [*PROMPT, EOD]


def test_draws_repeat_with_their_seed_and_stay_in_the_top_k():
    logits = torch.tensor([0.0, 5.0, 4.9, -1.0])
    config = GenerateConfig(temperature=1.0, top_k=2)
    draws = [choose_token(logits, config, torch.Generator().manual_seed(i)) for i in range(40)]
    again = [choose_token(logits, config, torch.Generator().manual_seed(i)) for i in range(40)]
    assert draws == again
    assert set(draws) == {1, 2}


def test_what_cannot_be_generated_is_refused():
    with pytest.raises(GenerationError, match="at least one"):
        generate(tiny(), [], GenerateConfig(), None)
    with pytest.raises(GenerationError, match=f"0..{VOCABULARY - 1}"):
        generate(tiny(), [VOCABULARY], GenerateConfig(), None)
    with pytest.raises(GenerationError, match="plain decoder"):
        generate(tiny(dec_cross_attention=()), PROMPT, GenerateConfig(), Fixed())
    with pytest.raises(GenerationError, match="top_k has no effect"):
        GenerateConfig(top_k=3)
