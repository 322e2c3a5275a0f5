"""Sums of which only one order gives the right bits."""

import torch

from lilora_kernels import functional

SHARES = torch.tensor([2.0**40, -(2.0**40), 1.0])  # 1 from first to last; 0 in fp32 from last to first


def assert_shares_are_added_in_order(device) -> None:
    """Of h over the columns, of dq over the outputs, and of the gradients of parameters over the rows."""
    size = 64 * len(SHARES)
    device(processors=len(SHARES), copies="now")
    values = torch.zeros(1, size)
    values[:, ::64] = SHARES  # 64: the fewest columns of a share
    one = torch.ones(1, 1)

    y = functional.delta(values, torch.ones(1, size), one)
    assert y.tolist() == [[1.0]]

    x = torch.ones(1, 1, requires_grad=True)
    y = functional.delta(x, one, torch.ones(size, 1))
    assert torch.autograd.grad(y, x, values)[0].tolist() == [[1.0]]

    rows = torch.zeros(512 * len(SHARES), 1)  # 512: the rows of a chunk
    rows[::512, 0] = SHARES
    a, b0 = one.clone().requires_grad_(), one.clone().requires_grad_()
    y = functional.delta(torch.ones_like(rows), a, b0)
    for gradient in torch.autograd.grad(y, (a, b0), rows):
        assert gradient.tolist() == [[1.0]]
