"""The composed plan: products grouped by expert, and by expert and task.

M_{e,t} is never formed: an expert sees few rows of a task, and all M_{e,t} are many.
"""

import torch
from torch import Tensor

from ..delta.eager import cast, dropout_mask, dropped, in_given_dtypes, keep_scale, wide, working_dtype
from ..philox import threshold
from ..schema import AdapterArgs
from .groups import Groups, groups_of


@in_given_dtypes
def forward(x: Tensor, weight: Tensor, ends: Tensor, adapter: AdapterArgs) -> tuple[Tensor, Tensor]:
    """y = x W_e^T + delta of each row's expert e, and h."""
    by_expert, by_pair = groups_of(ends, x, sizes_of(adapter))
    rows = cast(x, working_dtype(x))
    h = by_expert.times(dropped(rows, dropout_mask(*x.shape, rows.dtype, adapter)), adapter.a.mT)
    if threshold(adapter.p):
        h = h.mul_(keep_scale(adapter.p))
    _, sf, se, has_task = shares(adapter, by_pair, h)
    y = kept(by_expert.times(h * sf, adapter.b0.mT), has_task)
    z = by_pair.times(h * se, adapter.v.mT)
    y = cast(by_pair.times(z, adapter.u.mT, add_to=y), x.dtype)
    return by_expert.times(x, weight.mT, add_to=y), cast(h, x.dtype)


@in_given_dtypes
def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    h: Tensor | None,
    ends: Tensor,
    adapter: AdapterArgs,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients among `needs`; ops/README.md has their formulas."""
    by_expert, by_pair = groups_of(ends, dy, sizes_of(adapter))
    grads, given, dtype = {}, dy, working_dtype(dy)
    f, sf, se, has_task = shares(adapter, by_pair, cast(dy, dtype))
    dy, h = kept(cast(dy, dtype), has_task), h if h is None else kept(cast(h, dtype), has_task)
    if not needs.isdisjoint(("x", "a", "fusion")):
        p = kept(by_expert.times(dy, adapter.b0), has_task)
    if not needs.isdisjoint(("x", "a", "v", "fusion")):
        q = by_pair.times(dy, adapter.u)
    if not needs.isdisjoint(("u", "fusion")):
        z = by_pair.times(h, adapter.v.mT)
    if "b0" in needs:
        grads["b0"] = by_expert.sum_products(dy, h * sf, adapter.b0)
    if "u" in needs:
        grads["u"] = by_pair.sum_products(dy, z * se, adapter.u)
    if "v" in needs:
        grads["v"] = by_pair.sum_products(q * se, h, adapter.v)
    if "fusion" in needs:
        slope = (p * h).sum(1, dtype=wide(dtype)) - (q * z).sum(1, dtype=wide(dtype))
        of_rows = slope * cast(f * se, slope.dtype).squeeze(1)
        grads["fusion"] = cast(by_pair.taken(by_pair.sum(of_rows)), adapter.fusion.dtype)
    if "x" not in needs and "a" not in needs:
        return grads
    dh = by_pair.times(q * se, adapter.v, add_to=p * sf)
    if threshold(adapter.p):
        dh = dh.mul_(keep_scale(adapter.p))
    keep = dropout_mask(len(dy), adapter.a.shape[-1], dtype, adapter)
    if "x" in needs:
        dx = by_expert.times(dh, adapter.a)
        dx = cast(dx if keep is None else dx.mul_(keep), given.dtype)
        grads["x"] = by_expert.times(given, weight, add_to=dx)
    if "a" in needs:
        grads["a"] = by_expert.sum_products(dh, dropped(cast(x, dtype), keep), adapter.a)
    return grads


def sizes_of(adapter: AdapterArgs) -> tuple[int, ...]:
    return *adapter.a.shape[-2:], *adapter.u.shape[-2:]


def shares(adapter: AdapterArgs, by_pair: Groups, like: Tensor) -> tuple[float | Tensor | None, ...]:
    """f, s f and s e of every row [M, 1] in the dtype of `like`, zero for rows without a task, and which rows have one.

    Numbers where all are the same, and None.
    """
    tasks, s = by_pair.tasks, adapter.scaling
    if adapter.fusion is None and tasks is None:
        return 1.0, s, s, None
    if adapter.fusion is None:
        f = e = like.new_ones(adapter.u.shape[:2])
    else:
        f = torch.sigmoid(cast(adapter.fusion, wide(like.dtype)))
        e = 1 - f

    def of_rows(share: Tensor) -> Tensor:
        of_groups = share if tasks is None else torch.nn.functional.pad(share.T, (1, 0)).flatten()
        return cast(by_pair.spread(of_groups, len(like)), like.dtype)

    f, e = of_rows(f), of_rows(e)
    return f, f * s, e * s, None if tasks is None else f + e != 0


def kept(rows: Tensor, has_task: Tensor | None) -> Tensor:
    """Zero for rows without a task, whatever they hold: 0 times a value that is not finite is NaN."""
    return rows if has_task is None else torch.where(has_task, rows, 0)
