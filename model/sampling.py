"""From the logits of one position to a token. Pure functions of float32 logits [V]; a token that
cannot be chosen has the logit -inf.
"""

import torch
from torch import Tensor


def penalize_repetition(logits_V: Tensor, token_ids_n: Tensor, penalty: float) -> Tensor:
    """Makes tokens that occurred less likely: their logits are divided by the penalty if positive
    and multiplied by it if not (CTRL, arXiv 1909.05858, section 4.1, as commonly implemented)."""
    seen_n = logits_V[token_ids_n]
    penalized_n = torch.where(seen_n > 0, seen_n / penalty, seen_n * penalty)
    return logits_V.scatter(0, token_ids_n, penalized_n)


def keep_top_k(logits_V: Tensor, k: int) -> Tensor:
    """Exactly the k most likely tokens; among equals any."""
    best, places = logits_V.topk(min(k, len(logits_V)))
    return torch.full_like(logits_V, -torch.inf).scatter(0, places, best)


def keep_top_p(logits_V: Tensor, p: float) -> Tensor:
    """The fewest most likely tokens whose probabilities sum up to at least p (nucleus sampling,
    arXiv 1904.09751)."""
    ordered, places = logits_V.sort(descending=True)
    probabilities = ordered.softmax(0)
    before = probabilities.cumsum(0) - probabilities
    # The most likely token stays, whatever rounding makes of what stands before it.
    is_kept = (before < p).index_fill(0, torch.tensor([0]), True)
    return torch.full_like(logits_V, -torch.inf).scatter(0, places[is_kept], ordered[is_kept])


def choose_token(
    logits_V: Tensor, temperature: float, top_k: int, top_p: float, random: torch.Generator
) -> int:
    """The most likely token at temperature 0; else one drawn from what top_k (0: all) and then
    top_p (1: all) leave at this temperature."""
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / temperature
    if top_k:
        logits_V = keep_top_k(logits_V, top_k)
    if top_p < 1:
        logits_V = keep_top_p(logits_V, top_p)
    return int(torch.multinomial(logits_V.softmax(0), 1, generator=random))
