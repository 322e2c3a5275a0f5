"""Expand first, base GEMM on top: the kernels write the adapter's part, cuBLAS adds the base's to it (beta = 1)."""

import torch
from torch import Tensor

from ... import backends
from .. import triton_runtime as runtime
from ..delta import triton_backend as delta
from ..schema import AdapterArgs


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: AdapterArgs) -> tuple[Tensor, Tensor]:
    y, h = delta.run_forward(x, bias, adapter, backends.one_launch(x.shape[0], backends.ONE_LAUNCH_ROWS))
    return y.addmm_(x, weight.to(x.dtype).T), h


def backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, h: Tensor | None, adapter: AdapterArgs, needs: frozenset[str]
) -> dict[str, Tensor]:
    together = backends.one_launch(dy.shape[0], backends.ONE_LAUNCH_ROWS)
    grads = delta.run_backward(dy, x, h, adapter, needs, together)
    if "x" in needs:
        grads["x"].addmm_(dy, weight.to(dy.dtype))
    return grads


def rows(device: torch.device) -> list[int]:
    return runtime.bucket_rows(device)
