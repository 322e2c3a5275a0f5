"""Two adapters of one x, one after the other."""

import torch
from torch import Tensor

from ..call import Call
from ..delta import cuda_backend as delta


def forward(
    x: Tensor, weights: tuple[Tensor | None, ...], biases: tuple[Tensor | None, ...], calls: tuple[Call, Call]
) -> tuple[Tensor, ...]:
    ys, hs = zip(
        *(delta.run_forward(x, bias, call, False) for bias, call in zip(biases, calls, strict=True)), strict=True
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
    calls: tuple[Call, Call],
    needs: tuple[frozenset[str], frozenset[str]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first, second = (
        delta.run_backward(dy, x, h, call, wanted, False)
        for dy, h, call, wanted in zip(dys, hs, calls, needs, strict=True)
    )
    if "x" in first:
        first["x"] += second.pop("x")
        for dy, weight in zip(dys, weights, strict=True):
            if weight is not None:
                first["x"].addmm_(dy, weight.to(dy.dtype))
    return first, second


def rows(device: torch.device) -> list[int]:
    return delta.rows(device)
