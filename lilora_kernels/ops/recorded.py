"""The plan `recorded`: the formula for one task in torch operations that autograd itself records.

A function with a gradient of its own costs the host more than small products do. The price is what autograd keeps: M_t and
U V [N, R], and with dropout two more x.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import backends
from .delta.eager import dropout_mask, product
from .philox import keep_scale
from .schema import AdapterArgs

# Of x, y and what is kept, together, unless the plan is forced: larger products hide the host's work.
MOST_BYTES = 2**20
PLAN = {"recorded": f"for fp32 gradients of one task up to {MOST_BYTES >> 20} MiB"}


def bind(
    x: Tensor, *of: Tensor | AdapterArgs | None
) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor | None] | None:
    """bound(x, task, seed) -> y, see `Implementation`. of: weight and bias of `linear`, and the adapter."""
    *base, adapter = of
    plan = backends.forced["plan"]
    if plan not in (None, "recorded"):
        return None
    reason = unsupported_call(x, base, adapter)
    if plan is not None and reason is not None:
        raise backends.Unsupported(f"the plan 'recorded' cannot run here: {reason}")
    return Recorded(base, adapter, most_rows(x, adapter) if plan is None else math.inf) if reason is None else None


def unsupported_call(x: Tensor, base: list[Tensor | None], adapter: AdapterArgs) -> str | None:
    if adapter.task is not None or (adapter.u is not None and adapter.u.dim() != 2):
        return "it takes the factors of one task for all rows"
    if adapter.gate is not None or adapter.ranks is not None:
        return "it has neither gates nor ranks"
    if any(t is not None and t.requires_grad for t in base):
        return "its base is frozen"
    dtypes = {t.dtype for t in (x, *base, *adapter[:5]) if t is not None}
    if len(dtypes) > 1 or x.dtype not in (torch.float32, torch.float64):
        return f"it takes x and parameters all of float32 or float64, here are {sorted(map(str, dtypes))}"
    return None


def most_rows(x: Tensor, adapter: AdapterArgs) -> int:
    (outputs, rank), columns = adapter.b0.shape, adapter.a.shape[1]
    of_m = 0 if adapter.u is None else 2 * outputs * rank
    of_row = outputs + columns * (3 if adapter.p > 0 else 1)
    return (MOST_BYTES // x.itemsize - of_m) // max(of_row, 1)


class Recorded:
    def __init__(self, base: list[Tensor | None], adapter: AdapterArgs, most_rows: float) -> None:
        self.base, self.adapter, self.factors, self.most_rows = base, adapter, adapter[:5], most_rows
        self.scaling = adapter.scaling * keep_scale(adapter.p)

    def __call__(self, x: Tensor, task: Tensor | None, seed: Tensor | None) -> Tensor | None:
        a, b0, u, v, fusion = self.factors
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if task is not None or len(rows) > self.most_rows:
            return None
        y = linear(rows, *self.base) if self.base else None
        if self.adapter.p > 0:
            keep = dropout_mask(*rows.shape, rows.dtype, self.adapter._replace(seed=seed))
            rows = rows if keep is None else rows * keep
        if u is None:
            m = b0
        elif fusion is None:
            m = torch.addmm(b0, u, v)
        else:
            m = torch.lerp(torch.mm(u, v), b0, torch.sigmoid(fusion))
        h, scaling = linear(rows, a), self.scaling
        y = product(h, m.T, scaling) if y is None else y.addmm_(h, m.T, alpha=scaling)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])
