"""Which ranks of a pool stay when it is compressed, and what their keys become."""

import torch
from torch import Tensor

from lilora.methods.pclr.pool import GateRule, Query, RankPool, normalised
from lilora_kernels.functional import rank_gate


def strided(total: int, keep: int) -> Tensor:
    """Indices [keep] of `total` ranks without every m-th, m = total / (total - keep); evenly spread if m is no integer."""
    drop = total - keep
    return torch.tensor([i for i in range(total) if (i + 1) * drop // total == i * drop // total])


def least_redundant(gram: Tensor, keep: int) -> Tensor:
    """Indices [keep], rising, of the ranks left when those best explained linearly by the kept ones go first.

    Cholesky with pivoting on the Gram matrix [n, n] of the ranks: the next to keep is always the one with the largest
    residual after projection onto those kept already, the lowest index on ties.
    """
    gram = gram.double()
    residual = gram.diagonal().clone()
    rows = gram.new_zeros(keep, len(gram))
    kept: list[int] = []
    for i in range(keep):
        pivot = int(residual.argmax())
        column = gram[pivot] - rows[:i, pivot] @ rows[:i]
        rows[i] = column / column[pivot].clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        residual = (residual - rows[i].square()).clamp_min(0)
        kept.append(pivot)
        residual[kept] = -1
    return torch.tensor(sorted(kept))


def merged_keys(text: Tensor, vision: Tensor, queries: Query, rule: GateRule) -> tuple[Tensor, Tensor]:
    """Keys [n, d] with the query of each task added to its best `rule.rank` of them, at norm 1; as PCLR's code does.

    All tasks choose before any key changes.
    """
    pool = RankPool(rule, text.shape[1], vision.shape[1])
    text, vision = normalised(text), normalised(vision)
    pool.put("old", text, vision, train=False)
    chosen = rank_gate(pool.scores("old", queries), min(rule.rank, len(text)))[0]  # [tasks, n]
    return normalised(text + chosen.T @ queries.text), normalised(vision + chosen.T @ queries.vision)
