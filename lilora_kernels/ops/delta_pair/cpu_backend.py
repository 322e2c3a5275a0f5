"""The CPU kernels: for few rows both adapters in one call, for more one each; the composed plan where they do not take a call."""

from torch import Tensor

from .. import cpu_runtime, cpu_training
from ..schema import AdapterArgs
from . import eager


def forward(
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    biases: tuple[Tensor | None, ...],
    adapters: tuple[AdapterArgs, AdapterArgs],
) -> tuple[Tensor, ...]:
    sides = list(zip(adapters, weights, biases, strict=True))
    found = cpu_runtime.forward("delta_pair", x, *sides)
    if found is None:
        found = []
        for adapter, weight, bias in sides:
            side = cpu_training.forward(x, weight, bias, adapter)
            if side is None:
                return eager.forward(x, weights, biases, adapters)
            found.append(side)
    ys, hs = zip(*found, strict=True)
    return (*ys, *hs)


def backward(
    dys: tuple[Tensor, Tensor],
    x: Tensor | None,
    weights: tuple[Tensor | None, ...],
    hs: tuple[Tensor | None, ...],
    adapters: tuple[AdapterArgs, AdapterArgs],
    needs: tuple[frozenset[str], frozenset[str]],
) -> tuple[dict[str, Tensor], ...]:
    grads: list[dict[str, Tensor]] = []
    for dy, weight, h, adapter, wanted in zip(dys, weights, hs, adapters, needs, strict=True):
        side = cpu_training.backward(dy, x, weight, h, adapter, wanted) if wanted else {}
        if side is None:
            return eager.backward(dys, x, weights, hs, adapters, needs)
        grads.append(side)
    if "x" in needs[0]:
        grads[0]["x"] += grads[1].pop("x")
    return tuple(grads)
