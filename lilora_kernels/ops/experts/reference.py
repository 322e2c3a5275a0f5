"""The formula, written to be read: the oracle for every backend. Differentiable by autograd, any floating dtype."""

from torch import Tensor

from ..delta.reference import delta


def expert_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b0: Tensor,
    u: Tensor,
    v: Tensor,
    fusion: Tensor | None,
    expert: Tensor,
    task: Tensor | None = None,
    keep: Tensor | None = None,
    keep_scale: float = 1.0,
    scaling: float = 1.0,
) -> Tensor:
    """x W_e^T + delta of expert e -> [M, N], with expert [M] and task [M] of each row, in any order.

    weight [E, N, K], a [E, R, K], b0 [E, N, R]; u [T, E, N, S], v [T, E, S, R], fusion [T, E], without T where task is None.
    `keep` [M, K] is the dropout mask itself.
    """
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for e in range(weight.shape[0]):
        rows = (expert == e).nonzero().squeeze(1)
        own = [t if t is None else t[e] if task is None else t[:, e] for t in (u, v, fusion)]
        if task is None and fusion is not None:
            own[2] = own[2].reshape(1)
        adapter = delta(
            x[rows],
            a[e],
            b0[e],
            *own,
            task=None if task is None else task[rows],
            keep=None if keep is None else keep[rows],
            keep_scale=keep_scale,
            scaling=scaling,
        )
        y = y.index_add(0, rows, x[rows] @ weight[e].T + adapter)
    return y
