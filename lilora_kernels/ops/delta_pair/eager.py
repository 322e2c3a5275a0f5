"""Two adapters of one x with one dropout mask, in torch operations."""

from torch import Tensor

from ..call import Call
from ..delta import eager as delta
from ..philox import keep_scale


@delta.in_given_dtypes
def forward(
    x: Tensor, weights: tuple[Tensor | None, ...], biases: tuple[Tensor | None, ...], calls: tuple[Call, Call]
) -> tuple[Tensor, ...]:
    wide = x.to(delta.working_dtype(x))
    dropped = delta.dropped(wide, delta.dropout_mask(*x.shape, wide.dtype, calls[0]))
    ys, hs = [], []
    for weight, bias, call in zip(weights, biases, calls, strict=True):
        h = delta.scaled_h(dropped, call)
        y = wide.new_empty(x.shape[0], call.b0.shape[0])
        delta.expand(h, call, bias, y)
        y = y.to(x.dtype)
        ys.append(y if weight is None else y.addmm_(x, weight.to(x.dtype).T))
        hs.append(h.to(x.dtype))
    return (*ys, *hs)


@delta.in_given_dtypes
def backward(
    dys: tuple[Tensor, Tensor],
    x: Tensor | None,
    weights: tuple[Tensor | None, ...],
    hs: tuple[Tensor | None, ...],
    calls: tuple[Call, Call],
    needs: tuple[frozenset[str], frozenset[str]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    dtype = delta.working_dtype(dys[0])
    x, *hs = (t if t is None else t.to(dtype) for t in (x, *hs))
    wide_dys = [dy.to(dtype) for dy in dys]
    grads, dhs = zip(*map(delta.backward_up, wide_dys, hs, calls, needs), strict=True)
    keep = None
    if any(dh is not None for dh in dhs):
        keep = delta.dropout_mask(dys[0].shape[0], calls[0].a.shape[1], dtype, calls[0])
    if keep is not None:
        dhs = [None if dh is None else dh * keep_scale(calls[0].p) for dh in dhs]
    if "x" in needs[0]:
        dx = delta.dx_part(dhs[0], keep, calls[0]).add_(delta.dx_part(dhs[1], keep, calls[1])).to(dys[0].dtype)
        for dy, weight in zip(dys, weights, strict=True):
            if weight is not None:
                dx.addmm_(dy, weight.to(dy.dtype))
        grads[0]["x"] = dx
    if any("a" in wanted for wanted in needs):
        dropped = delta.dropped(x, keep)
        for grad, dh, call, wanted in zip(grads, dhs, calls, needs, strict=True):
            if "a" in wanted:
                grad["a"] = delta.da(dh, dropped, call)
    return grads
