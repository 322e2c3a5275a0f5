"""Two adapters of one x with one dropout mask, in torch operations."""

from torch import Tensor

from ..delta import eager as delta
from ..philox import keep_scale
from ..schema import AdapterArgs


@delta.in_given_dtypes
def forward(
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    biases: tuple[Tensor | None, ...],
    adapters: tuple[AdapterArgs, AdapterArgs],
) -> tuple[Tensor, ...]:
    wide = x.to(delta.working_dtype(x))
    dropped = delta.dropped(wide, delta.dropout_mask(*x.shape, wide.dtype, adapters[0]))
    ys, hs = [], []
    for weight, bias, adapter in zip(weights, biases, adapters, strict=True):
        h = delta.scaled_h(dropped, adapter)
        y = delta.cast(delta.expand(h, adapter, bias), x.dtype)
        ys.append(y if weight is None else y.addmm_(x, delta.cast(weight, x.dtype).T))
        hs.append(delta.cast(h, x.dtype))
    return (*ys, *hs)


@delta.in_given_dtypes
def backward(
    dys: tuple[Tensor, Tensor],
    x: Tensor | None,
    weights: tuple[Tensor | None, ...],
    hs: tuple[Tensor | None, ...],
    adapters: tuple[AdapterArgs, AdapterArgs],
    needs: tuple[frozenset[str], frozenset[str]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    dtype = delta.working_dtype(dys[0])
    x, *hs = (t if t is None else t.to(dtype) for t in (x, *hs))
    wide_dys = [dy.to(dtype) for dy in dys]
    grads, dhs = zip(*map(delta.backward_up, wide_dys, hs, adapters, needs), strict=True)
    keep = None
    if any(dh is not None for dh in dhs):
        keep = delta.dropout_mask(dys[0].shape[0], adapters[0].a.shape[1], dtype, adapters[0])
    if keep is not None:
        dhs = [None if dh is None else dh * keep_scale(adapters[0].p) for dh in dhs]
    if "x" in needs[0]:
        dx = delta.dx_part(dhs[0], keep, adapters[0]).add_(delta.dx_part(dhs[1], keep, adapters[1])).to(dys[0].dtype)
        for dy, weight in zip(dys, weights, strict=True):
            if weight is not None:
                dx.addmm_(dy, delta.cast(weight, dy.dtype))
        grads[0]["x"] = dx
    if any("a" in wanted for wanted in needs):
        dropped = delta.dropped(x, keep)
        for grad, dh, adapter, wanted in zip(grads, dhs, adapters, needs, strict=True):
            if "a" in wanted:
                grad["a"] = delta.da(dh, dropped, adapter)
    return grads
