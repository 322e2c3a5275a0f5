"""Two adapters of one x, one after the other."""

import torch
from torch import Tensor

from ..delta import cuda_backend as delta
from ..schema import AdapterArgs


def forward(
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    biases: tuple[Tensor | None, ...],
    adapters: tuple[AdapterArgs, AdapterArgs],
) -> tuple[Tensor, ...]:
    ys, hs = zip(
        *(delta.run_forward(x, bias, adapter, False) for bias, adapter in zip(biases, adapters, strict=True)),
        strict=True,
    )
    for y, weight in zip(ys, weights, strict=True):
        if weight is not None:
            y.addmm_(x, weight.to(x.dtype).T)
    return *ys, *hs


def backward(
    dys: tuple[Tensor, Tensor],
    x: Tensor | None,
    weights: tuple[Tensor | None, ...],
    hs: tuple[Tensor | None, ...],
    adapters: tuple[AdapterArgs, AdapterArgs],
    needs: tuple[frozenset[str], frozenset[str]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first, second = (
        delta.run_backward(dy, x, h, adapter, wanted, False)
        for dy, h, adapter, wanted in zip(dys, hs, adapters, needs, strict=True)
    )
    if "x" in first:
        first["x"] += second.pop("x")
        for dy, weight in zip(dys, weights, strict=True):
            if weight is not None:
                first["x"].addmm_(dy, weight.to(dy.dtype))
    return first, second


def rows(device: torch.device) -> list[int]:
    return delta.rows(device)
