"""What each prediction depends on, read off gradients and compared with the definition as sets."""

import pytest
import torch

from model.config import RetroConfig
from model.initialization import initialize
from model.retro import Retro

PAD, EOD, VOCABULARY, M, K = 0, 1, 20, 4, 2


def tiny(**changes):
    shape = {
        "hidden_size": 16,
        "ffn_hidden_size": 32,
        "num_attention_heads": 2,
        "dec_num_layers": 3,
        "dec_cross_attention": (1,),
        "enc_num_layers": 1,
        "enc_cross_attention": (0,),
        "init_method_std": 0.3,
        "vocab_size": VOCABULARY,
        "eod_id": EOD,
        "chunk_size": M,
    }
    model = Retro(RetroConfig(**(shape | changes))).double()
    initialize(model, 0)
    return model


def sample(length):
    """Two documents; the first ends with its end-of-document token and two pads that fill its
    chunk."""
    tokens = torch.arange(2, 2 + length).remainder(VOCABULARY - 2) + 2
    tokens[5], tokens[6:8] = EOD, PAD
    neighbors = torch.randint(2, VOCABULARY, (1, length // M, K, 2 * M))
    mask = torch.ones_like(neighbors, dtype=torch.bool)
    mask[0, 1, 0, 5:] = False
    mask[0, 2, 1] = False
    return tokens[None], neighbors, mask


def dependencies(model, tokens, neighbors, mask):
    """For each position: the token positions and the neighbor tokens (u, k, r) with a gradient."""
    embedded = []

    def keep(_module, _inputs, output):
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.word_embeddings.register_forward_hook(keep)
    found = []
    logits = model(tokens, tokens != PAD, neighbors, mask)
    hook.remove()
    for t in range(tokens.shape[1]):
        wanted = torch.randn(VOCABULARY, dtype=torch.float64)
        grads = torch.autograd.grad((logits[0, t] * wanted).sum(), embedded, retain_graph=True)
        touched = grads[0].abs().sum(-1) > 0
        of_tokens, of_neighbors = touched.split([tokens.numel(), neighbors.numel()])
        on_tokens = set(of_tokens.nonzero()[:, 0].tolist())
        places = of_neighbors.view(neighbors.shape)[0].nonzero()
        found.append((on_tokens, {tuple(place) for place in places.tolist()}))
    return found


def definition(tokens, mask, reset):
    """The same sets from the text of the definition; chunk u is seen from token (u + 1) M - 1
    on."""
    row = tokens[0].tolist()
    document = [row[:t].count(EOD) for t in range(len(row))]

    def past(t):
        return {j for j in range(t + 1) if row[j] != PAD and document[j] == document[t]}

    expected = []
    for t in range(len(row)):
        seen = {
            (q + 1) // M - 1
            for q in past(t)
            if q >= M - 1 and (not reset or document[((q + 1) // M - 1) * M] == document[q])
        }
        read = {j for u in seen for p in range(u * M, u * M + M) if row[p] != PAD for j in past(p)}
        shown = {
            (u, k, r) for u in seen for k in range(K) for r in range(2 * M) if mask[0, u, k, r]
        }
        expected.append((past(t) | (read if shown else set()), shown))
    return expected


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("length", [16, 18])
def test_dependencies_are_exactly_the_definition(version, reset, length):
    torch.manual_seed(0)
    tokens, neighbors, mask = sample(length)
    model = tiny(version=version, reset_cross_attention=reset)
    found = dependencies(model, tokens, neighbors, mask)
    expected = definition(tokens, mask, reset)
    for t in (t for t in range(length) if tokens[0, t] != PAD):
        assert found[t] == expected[t], f"position {t}"


def test_without_encoder_cross_attention_other_documents_stay_out():
    torch.manual_seed(0)
    tokens, neighbors, mask = sample(16)
    found = dependencies(tiny(enc_cross_attention=()), tokens, neighbors, mask)
    assert found[15][0] == set(range(8, 16))
