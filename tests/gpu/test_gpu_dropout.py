"""The dropout masks that the kernels draw on a GPU."""

import pytest
import torch
from support.gpu_cases import seed_tensor

from lilora_kernels import functional
from lilora_kernels.ops.philox import keep_mask


@pytest.mark.parametrize("rows", [70, 300, 3000])
@pytest.mark.parametrize("op, name", [("delta", "one_launch"), ("linear", "by_phase")])
def test_forward_and_backward_draw_the_mask_of_the_reference(op, name, rows, plan):
    """Bit for bit, hence both backends the same: with ones or identities as factors, what is not zero is the mask."""
    plan(name)
    rank, columns = 64, 200
    ones = lambda *shape: torch.ones(*shape, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    eye = lambda *shape: torch.eye(*shape, dtype=torch.bfloat16, device="cuda")  # noqa: E731

    def run(x, a, p, seed):
        if op == "delta":
            return functional.delta(x, a, eye(rank), p=p, seed=seed)
        return functional.linear(x, torch.zeros_like(a), None, a, eye(rank), p=p, seed=seed)

    for p in (0.05, 0.5, 0.999):
        for value in (0, -1, 2**40 + 7, -(2**63)):
            seed = seed_tensor(value)
            y = run(ones(rows, rank), eye(rank), p, seed)
            assert torch.equal(y != 0, keep_mask(seed, rows, rank, p))
            x, a = ones(rows, columns).requires_grad_(), ones(rank, columns).requires_grad_()
            keep = keep_mask(seed, rows, columns, p)
            (dx,) = torch.autograd.grad(run(x, a, p, seed), x, ones(rows, rank))
            assert torch.equal(dx != 0, keep)
            (da,) = torch.autograd.grad(run(x, a, p, seed), a, eye(rows, rank))
            assert torch.equal(da != 0, keep[:rank])
