"""Decoding as it is defined: a full forward pass for every token."""

import numpy as np
import torch

from model.retriever import Neighbor, Neighbors
from tests.model.test_causality import VOCABULARY, M


class ByContent:
    """A retriever whose neighbors depend on the chunk and their rank; remembers its calls."""

    def __init__(self, found=3, is_full=True):
        self.calls, self.found, self.is_full = [], found, is_full

    def is_empty(self):
        return not self.is_full

    def retrieve(self, chunks, neighbors):
        self.calls.append((chunks.tolist(), neighbors))
        ranks = np.arange(1, neighbors + 1)[:, None]
        folded = chunks[:, None] * (ranks + 2) + chunks.sum(1)[:, None, None]
        tokens = np.tile(folded % (VOCABULARY - 2) + 2, (1, 1, 2))
        mask = np.ones(tokens.shape, bool)
        mask[:, self.found :] = False
        mask[:, :, -1] = False
        shown = tuple(
            tuple(Neighbor(int(row[0]), "static", f"{row}", "", 0.5) for row in of[: self.found])
            for of in tokens
        )
        return Neighbors(tokens, mask, shown)


@torch.no_grad()
def plain_logits(model, tokens, config, retriever, num_pads=0):
    """[L, V] of a sequence, pads included. One shorter than a chunk is filled up to it: what comes
    later changes nothing."""
    if retriever is None or retriever.is_empty() or config.neighbors == 0:
        row = torch.tensor([tokens])
        return model(row, torch.arange(len(tokens))[None] >= num_pads)[0]
    whole, row = len(tokens) // M, torch.tensor([tokens + [2] * (M - len(tokens))])
    shape = (max(whole, 1), config.neighbors, 2 * M)
    ids, mask = torch.zeros(shape).long(), torch.zeros(shape).bool()
    if whole:
        chunks = np.asarray(tokens[: whole * M]).reshape(whole, M)
        found = retriever.retrieve(chunks, config.neighbors)
        ids, mask = torch.from_numpy(found.tokens), torch.from_numpy(found.mask)
        mask[[u for u in range(whole) if u % config.retrieval_interval]] = False
    real = torch.arange(row.shape[1])[None] >= num_pads
    return model(row, real, ids[None], mask[None])[0, : len(tokens)]


def plain_decode(model, prompt, config, retriever=None, num_pads=0, pad=0):
    """The most likely new tokens, and the log-probabilities before each."""
    tokens, logprobs = [pad] * num_pads + list(prompt), []
    for _ in range(config.max_new_tokens):
        logits = plain_logits(model, tokens, config, retriever, num_pads)[-1].float()
        logprobs.append(logits.log_softmax(0))
        if len(logprobs) <= config.min_new_tokens:
            logits[model.config.eod_id] = -torch.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] == model.config.eod_id:
            break
    return tokens[num_pads + len(prompt) :], logprobs
