"""Sums of which only one order gives the right bits."""

from itertools import combinations

import torch

from lilora_kernels import functional

BIG = 2.0**40  # in fp32 it takes in whatever is below 2**16


def sums(shares: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Terms [sums, shares, 2], a share's first and last, and what their sums are if, and only if, each share is summed by
    itself and the shares are added one by one, from first to last."""
    terms, results = [], []
    for first, second in combinations(range(shares), 2):  # only what is added behind both is left
        one = torch.zeros(shares, 2)
        one[:, 0] = 2.0 ** torch.arange(shares)
        one[first, 0], one[second, 0] = BIG, -BIG
        terms.append(one)
        results.append(one[second + 1 :].sum())
    for share in range(1, shares):  # 0 if the share before is in the same sum
        one = torch.zeros(shares, 2)
        one[share - 1, 0], one[share, 0], one[share, 1] = 1, BIG, -BIG
        terms.append(one)
        results.append(torch.tensor(1.0))
    return torch.stack(terms), torch.stack(results)


def along(terms: torch.Tensor, share: int) -> torch.Tensor:
    """[sums, shares * share]: the terms at the beginnings of a share's first step of 64 and of its last."""
    rows = torch.zeros(*terms.shape[:2], share)
    rows[..., 0], rows[..., share - 64] = terms.unbind(-1)
    return rows.flatten(1).bfloat16()


def assert_equal(name: str, got: torch.Tensor, results: torch.Tensor) -> None:
    wrong = got != results
    assert not wrong.any(), f"the shares of {name}: {wrong.sum()} of {wrong.numel()} sums are wrong"


def assert_shares_are_added_in_order(device) -> None:
    """Of h over the columns, of dq over the outputs, and of the gradients of parameters over the rows."""
    device(processors=24, copies="now")  # the backward has three tiles of rows: eight shares of each
    terms, results = sums(8)
    values = along(terms, 128)  # two steps: the fewest of a share
    rows, size = values.shape
    one, ones = torch.ones(1, 1), torch.ones(1, size)

    y = functional.delta(values, ones, one)
    assert_equal("h", y[:, 0], results)

    x = torch.ones(rows, 1, dtype=torch.bfloat16, requires_grad=True)
    y = functional.delta(x, one, ones.T)
    assert_equal("dq", torch.autograd.grad(y, x, values)[0][:, 0], results)

    terms, results = sums(9)  # eight are loaded at once
    values = along(terms, 2048).T  # the rows of a chunk
    both = torch.cat((values, torch.ones(len(values), 1)), 1).bfloat16()  # h and dh are the ones
    one = torch.eye(both.shape[1])[-1:]
    a, b0 = one.clone().requires_grad_(), one.T.clone().requires_grad_()
    y = functional.delta(both, a, b0)
    da, db0 = torch.autograd.grad(y, (a, b0), both)
    assert_equal("da", da[0, :-1], results)
    assert_equal("db0", db0[:-1, 0], results)
