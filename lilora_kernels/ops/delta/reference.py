"""The formula, written to be read: the oracle for every backend. Differentiable by autograd, any floating dtype."""

import torch
from torch import Tensor


def up_projections(b0: Tensor, u: Tensor | None, v: Tensor | None, fusion: Tensor | None) -> Tensor:
    """M_t for every task: [T, N, R] from b0 [N, R], u [T, N, S], v [T, S, R], fusion [T].

    [1, N, R] without u and v, and for u [N, S] and v [S, R] of one task.
    """
    if u is None:
        return b0.unsqueeze(0)
    if fusion is None:
        return (b0 + u @ v).reshape(-1, *b0.shape)
    f = torch.sigmoid(fusion)[:, None, None]
    return f * b0 + (1 - f) * (u @ v)


def delta(
    x: Tensor,
    a: Tensor,
    b0: Tensor,
    u: Tensor | None = None,
    v: Tensor | None = None,
    fusion: Tensor | None = None,
    task: Tensor | None = None,
    gate: Tensor | None = None,
    gate_row: Tensor | None = None,
    keep: Tensor | None = None,
    keep_scale: float = 1.0,
    scaling: float = 1.0,
) -> Tensor:
    """s * (h * g) M_t^T -> [M, N]. Shapes as in ops/README.md; `keep` [M, K] is the dropout mask itself."""
    dropped = x if keep is None else x * keep.to(x.dtype) * keep_scale
    h = dropped @ a.T
    if gate is not None:
        h = h * (gate[gate_row] if gate_row is not None else gate)
    m = up_projections(b0, u, v, fusion)
    if task is None:
        return scaling * (h @ m[0].T)
    y = h.new_zeros(x.shape[0], b0.shape[0])
    if u is None:
        return y + scaling * (task >= 0).to(h.dtype).unsqueeze(1) * (h @ b0.T)
    for t in range(m.shape[0]):
        y = y + scaling * (task == t).to(h.dtype).unsqueeze(1) * (h @ m[t].T)
    return y
