"""Expand first, base GEMM on top: the adapter writes the output once and the base accumulates into it (beta = 1)."""

from torch import Tensor

from ..delta import eager as delta
from ..schema import AdapterArgs


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: AdapterArgs) -> tuple[Tensor, Tensor]:
    y, h = delta.forward(x, adapter, bias)
    return y.addmm_(x, delta.cast(weight, x.dtype).T), h


def backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, h: Tensor | None, adapter: AdapterArgs, needs: frozenset[str]
) -> dict[str, Tensor]:
    grads = delta.backward(dy, x, h, adapter, needs)
    if "x" in needs:
        grads["x"].addmm_(dy, delta.cast(weight, dy.dtype))
    return grads
