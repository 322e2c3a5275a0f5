"""Two adapters of one x with one dropout mask, by the composed plan."""

from torch import Tensor

from ..delta import eager as delta
from ..schema import AdapterArgs


@delta.in_given_dtypes
def forward(
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    biases: tuple[Tensor | None, ...],
    adapters: tuple[AdapterArgs, AdapterArgs],
    parts: delta.Parts = delta.TORCH,
) -> tuple[Tensor, ...]:
    hs, ys = parts.shrink(delta.cast(x, parts.working_dtype(x)), adapters), []
    for h, weight, bias, adapter in zip(hs, weights, biases, adapters, strict=True):
        y = delta.cast(delta.expand(h, adapter, bias, parts), x.dtype)
        ys.append(y if weight is None else y.addmm_(x, delta.cast(weight, x.dtype).T))
    return *ys, *(delta.cast(h, x.dtype) for h in hs)


@delta.in_given_dtypes
def backward(
    dys: tuple[Tensor, Tensor],
    x: Tensor | None,
    weights: tuple[Tensor | None, ...],
    hs: tuple[Tensor | None, ...],
    adapters: tuple[AdapterArgs, AdapterArgs],
    needs: tuple[frozenset[str], frozenset[str]],
    parts: delta.Parts = delta.TORCH,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    dtype = parts.working_dtype(dys[0])
    x, *hs = (t if t is None else delta.cast(t, dtype) for t in (x, *hs))
    found = [
        delta.backward_up(delta.cast(dy, dtype), h, adapter, wanted, parts) if wanted else ({}, None)
        for dy, h, adapter, wanted in zip(dys, hs, adapters, needs, strict=True)
    ]
    grads, dhs = zip(*found, strict=True)
    if any(wanted & {"x", "a"} for wanted in needs):
        for own, of_x in zip(grads, parts.down(x, dhs, adapters, needs), strict=True):
            own |= of_x
    if "x" in needs[0]:
        dx = grads[0]["x"] = delta.cast(grads[0]["x"], dys[0].dtype)
        for dy, weight in zip(dys, weights, strict=True):
            if weight is not None:
                dx.addmm_(dy, delta.cast(weight, dy.dtype))
    return grads
