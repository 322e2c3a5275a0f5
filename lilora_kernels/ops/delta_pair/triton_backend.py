"""One pass over x for two adapters: their h in one launch, and in backward dx with both da in one."""

from torch import Tensor

from .. import triton_runtime as runtime
from ..delta import triton_backend as delta
from ..delta.triton_parts import TRITON
from ..delta.triton_phases import Backward, Forward
from ..schema import AdapterArgs
from . import eager

rows = delta.rows


def forward(
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    biases: tuple[Tensor | None, ...],
    adapters: tuple[AdapterArgs, AdapterArgs],
) -> tuple[Tensor, ...]:
    if delta.plan_of(x, adapters[0], few="by_phase") == "composed":
        return eager.forward(x, weights, biases, adapters, TRITON)
    config = runtime.config("forward", False, x, adapters[0])
    main, other = (Forward(x, bias, adapter, config) for bias, adapter in zip(biases, adapters, strict=True))
    main.launch(0, 0, second=other)
    for work, weight in zip((main, other), weights, strict=True):
        for first, last in work.phases[1:]:
            work.launch(first, last)
        if weight is not None:
            work.y.addmm_(x, weight.to(x.dtype).T)
    return main.y, other.y, main.h, other.h


def backward(
    dys: tuple[Tensor, Tensor],
    x: Tensor | None,
    weights: tuple[Tensor | None, ...],
    hs: tuple[Tensor | None, ...],
    adapters: tuple[AdapterArgs, AdapterArgs],
    needs: tuple[frozenset[str], frozenset[str]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if delta.plan_of(dys[0], adapters[0], few="by_phase") == "composed":
        return eager.backward(dys, x, weights, hs, adapters, needs, TRITON)
    reads_x = [bool(wanted & {"x", "a"}) for wanted in needs]
    first = 0 if reads_x[0] else 1
    second = 1 - first
    config = runtime.config("backward", False, dys[first], adapters[first])
    main = Backward(dys[first], x, hs[first], adapters[first], needs[first], config)
    other = Backward(dys[second], x, hs[second], adapters[second], needs[second], config, like=main)
    for work in (main, other):
        for phase, _ in work.phases:
            if phase < 2:
                work.launch(phase, phase)
    for work in (main, other):
        for phase, _ in work.phases:
            if phase >= 2:
                work.launch(phase, phase, second=other if work is main and phase == 2 and reads_x[second] else None)
    if "x" in main.grads:
        for dy, weight in zip(dys, weights, strict=True):
            if weight is not None:
                main.grads["x"].addmm_(dy, weight.to(dy.dtype))
    return (main.grads, other.grads) if first == 0 else (other.grads, main.grads)
