"""The formula, written to be read: the oracle for every backend."""

import torch
from torch import Tensor


def rank_gate(scores: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(gate [G, n], chosen [G, r]): a rank is chosen when fewer than r others come before it."""
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    first, second = scores.unsqueeze(2), scores.unsqueeze(1)  # [G, i, j]
    index = torch.arange(scores.shape[1], device=scores.device)
    before = (first > second) | ((first == second) & (index.unsqueeze(1) < index))
    position = before.sum(1)  # of j, 0 is the best: a permutation of 0..n-1 in every row
    return (position < r).to(scores.dtype), position.argsort(1)[:, :r]
