"""Incremental decoding under teacher forcing: each step's logits are those of the full forward pass
over the same tokens and neighbors."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from model import incremental
from model.decoding_pass import ChunkNeighbors
from model.incremental import IncrementalRetro
from tests.model.test_causality import EOD, PAD, VOCABULARY, K, M, tiny
from tests.model.test_families import FAMILIES, MODERN

LENGTH = 4 * M + 3


@dataclass
class Given:
    """A sequence to feed, with the neighbors of its chunks; None: retrieval is off."""

    tokens: list[int]
    neighbors: list[ChunkNeighbors | None] | None
    num_pads: int = 0


def given(seed, length=LENGTH, ends=(), num_pads=0, without=(), most=K):
    """Neighbors of each chunk are others; some have pads, fewer than K or, in `without`, none."""
    random = np.random.default_rng(seed)
    tokens = random.integers(2, VOCABULARY, length)
    tokens[list(ends)] = EOD
    tokens[:num_pads] = PAD
    neighbors = []
    for u in range(length // M):
        shown = random.integers(2, VOCABULARY, (most, 2 * M)), random.random((most, 2 * M)) < 0.8
        neighbors.append(None if u in without else ChunkNeighbors(*shown))
    return Given(tokens.tolist(), neighbors, num_pads)


@torch.no_grad()
def full(model, row):
    """[L, V] of the full forward pass."""
    tokens = torch.tensor([row.tokens])
    real = torch.arange(len(row.tokens))[None] >= row.num_pads
    if row.neighbors is None or not row.neighbors:
        blank = torch.zeros(1, 0, 1, 2 * M, dtype=torch.long)
        shown = () if row.neighbors is None else (blank, blank.bool())
        return model(tokens, real, *shown)[0]
    most = max((len(n.tokens_KR) for n in row.neighbors if n is not None), default=1)
    ids = torch.zeros(1, len(row.neighbors), most, 2 * M, dtype=torch.long)
    mask = torch.zeros_like(ids).bool()
    for u, shown in enumerate(row.neighbors):
        if shown is not None:
            ids[0, u], mask[0, u] = (
                torch.from_numpy(part) for part in (shown.tokens_KR, shown.mask_KR)
            )
    return model(tokens, real, ids, mask)[0]


@torch.no_grad()
def forced(decoder, rows, prompts, steps):
    """[steps + 1, V] logits of each row: after its prompt and after each further token."""
    held = []
    found = []
    for row, prompt in zip(rows, prompts, strict=True):
        held.append(decoder.cache.add_row(row.num_pads, row.neighbors is not None))
        chunks = (row.neighbors or [None] * LENGTH)[: prompt // M]
        found.append([decoder.read_prompt(held[-1], row.tokens[:prompt], chunks)])
    for _ in range(steps):
        places = [h.length for h in held]
        tokens = [row.tokens[p] for row, p in zip(rows, places, strict=True)]
        logits = decoder.step(tokens, [shown(r, p) for r, p in zip(rows, places, strict=True)])
        for i in range(len(rows)):
            found[i].append(logits[i])
    return [torch.stack(f) for f in found]


def shown(row, place):
    return row.neighbors[(place + 1) // M - 1] if row.neighbors and (place + 1) % M == 0 else None


def check(model, rows, prompts, steps):
    decoder = IncrementalRetro(model, len(rows), LENGTH, K + 1)
    for row, prompt, found in zip(
        rows, prompts, forced(decoder, rows, prompts, steps), strict=True
    ):
        expected = full(model, row)[prompt - 1 : prompt + steps]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


OTHERS = [
    pytest.param({"version": 1, "reset_cross_attention": False}, id="version1"),
    pytest.param({"reset_attention_mask": False, "cross_attention_gate": True}, id="all-documents"),
    pytest.param({"dec_cross_attention": (0, 2), "output_width_mult": 2.0}, id="two-layers-mup"),
]


def model_of(family):
    model = tiny(**family).float()
    for layer in model.decoder_layers:
        cross = layer.feed_forward_half.cross_attention
        if cross is not None and cross.gate is not None:
            torch.nn.init.constant_(cross.gate, 0.7)
    return model


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_every_prompt_length_is_the_full_forward(family):
    model, row = model_of(family), given(1)
    for prompt in range(1, 3 * M + 2):
        check(model, [row], [prompt], LENGTH - prompt)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_unequal_rows_with_documents_pads_and_retrieval_off_are_each_their_full_forward(family):
    rows = [
        given(1, ends=(2, M - 1, M + 1)),
        given(2, num_pads=3, ends=(2 * M + 1,)),
        given(3, without=(0, 2), most=K + 1),
        Given(given(4, ends=(5,)).tokens, None),
        given(5, ends=(0, 3 * M - 2), most=1),
        given(6, num_pads=1),
    ]
    check(model_of(family), rows, [1, M, 2 * M + 1, M - 1, 2 * M - 1, 3], 2 * M + 2)
    check(model_of(family), rows[:3], [3 * M, 3 * M - 1, 2], M)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_several_passes_is_the_full_forward(family, monkeypatch):
    monkeypatch.setattr(incremental, "_PROMPT_TOKENS", 2 * M)
    model = model_of(family)
    rows = [given(i, ends=(M + 1, 2 * M - 1), num_pads=1, without=(i,)) for i in range(4)]
    for row in (*rows, given(4), given(5, without=range(4))):
        for prompt in (2 * M, 2 * M + 1, 4 * M - 1, 4 * M, LENGTH - 1):
            check(model, [row], [prompt], LENGTH - prompt)


def test_a_plain_decoder_is_the_full_forward():
    rows = [Given(given(i, ends=(i,)).tokens, None) for i in (1, 2)]
    check(tiny(dec_cross_attention=(), **MODERN).float(), rows, [1, 7], 8)
