"""The l1 norm of a low-rank update of a weight, of which only some rows are in memory at a time."""

import torch
from torch import Tensor

ROWS = 1024  # of the update, at a time


def update_l1(b: Tensor, a: Tensor, counts: Tensor | None = None) -> Tensor:
    """sum over n and k of counts[n, k] |(b a)[n, k]|, ones for None: b [N, r], a [r, K], counts [N, K] -> a scalar.

    In fp32 at least. Differentiable with respect to b and a; where an entry is 0 its gradient is.
    """
    return _UpdateL1.apply(b, a, counts)


class _UpdateL1(torch.autograd.Function):
    """The gradients, S a^T and b^T S with S = counts * sign(b a), are made with the norm."""

    @staticmethod
    def forward(ctx, b: Tensor, a: Tensor, counts: Tensor | None) -> Tensor:
        wide = torch.promote_types(b.dtype, torch.float32)
        wide_b, wide_a = b.to(wide), a.to(wide)
        grad_b, grad_a, norm = torch.empty_like(wide_b), torch.zeros_like(wide_a), wide_a.new_zeros(())
        with torch.autocast(b.device.type, enabled=False):
            for start in range(0, len(b), ROWS):
                rows = slice(start, start + ROWS)
                update = wide_b[rows] @ wide_a
                signs = update.sign() if counts is None else update.sign() * counts[rows]
                norm += (signs * update).sum()
                torch.mm(signs, wide_a.mT, out=grad_b[rows])
                grad_a += wide_b[rows].mT @ signs
        ctx.save_for_backward(grad_b.to(b.dtype), grad_a.to(a.dtype))
        return norm

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_b, grad_a = ctx.saved_tensors
        return grad_b * grad.to(grad_b.dtype), grad_a * grad.to(grad_a.dtype), None
