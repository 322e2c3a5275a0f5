"""Two adapters of one x with one dropout mask, in torch operations."""

from torch import Tensor

from ..call import Call
from ..delta import eager as delta
from ..philox import keep_scale


def forward(
    x: Tensor, weights: tuple[Tensor | None, ...], biases: tuple[Tensor | None, ...], calls: tuple[Call, Call]
) -> tuple[Tensor, ...]:
    dropped = delta.dropped(x, delta.dropout_mask(*x.shape, x.dtype, calls[0]))
    ys, hs = [], []
    for weight, bias, call in zip(weights, biases, calls, strict=True):
        h = delta.scaled_h(dropped, call)
        y = x.new_empty(x.shape[0], call.b0.shape[0])
        delta.expand(h, call, bias, y)
        ys.append(y if weight is None else y.addmm_(x, weight.to(x.dtype).T))
        hs.append(h)
    return (*ys, *hs)


def backward(
    dys: tuple[Tensor, Tensor],
    x: Tensor | None,
    weights: tuple[Tensor | None, ...],
    hs: tuple[Tensor | None, ...],
    calls: tuple[Call, Call],
    needs: tuple[frozenset[str], frozenset[str]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    grads, dhs = zip(*map(delta.backward_up, dys, hs, calls, needs), strict=True)
    keep = None
    if any(dh is not None for dh in dhs):
        keep = delta.dropout_mask(dys[0].shape[0], calls[0].a.shape[1], dys[0].dtype, calls[0])
    if keep is not None:
        dhs = [None if dh is None else dh * keep_scale(calls[0].p) for dh in dhs]
    if "x" in needs[0]:
        dx = delta.dx_part(dhs[0], keep, calls[0]).add_(delta.dx_part(dhs[1], keep, calls[1]))
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
