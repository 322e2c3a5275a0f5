"""Expand first, base GEMM on top: the adapter's part is written, and cuBLAS adds the base's to it (beta = 1)."""

from torch import Tensor

from ..delta import triton_backend as delta
from ..schema import AdapterArgs

rows, bind, bind_gradients = delta.rows, delta.bind, delta.bind_gradients


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: AdapterArgs) -> tuple[Tensor, Tensor]:
    y, h = delta.forward(x, adapter, bias)
    return y.addmm_(x, weight.to(x.dtype).T), h


def backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, h: Tensor | None, adapter: AdapterArgs, needs: frozenset[str]
) -> dict[str, Tensor]:
    grads = delta.backward(dy, x, h, adapter, needs)
    if "x" in needs:
        grads["x"].addmm_(dy, weight.to(dy.dtype))
    return grads
