"""One pass over x for two adapters: their h in one launch, and in backward dx with both da in one."""

from torch import Tensor

from ..delta import triton_backend as delta
from ..delta.triton_jobs import Backward, Forward
from ..delta.triton_parts import TRITON
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
    other = Forward(x, biases[1], adapters[1], pair=True)
    main = Forward(x, biases[0], adapters[0], other=other)
    main.shrink()
    for work, weight in zip((main, other), weights, strict=True):
        work.expand()
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
    main = Backward(dys[first], x, hs[first], adapters[first], needs[first])
    other = Backward(dys[second], x, hs[second], adapters[second], needs[second], first=main)
    for work in (main, other):
        work.from_dy()
    for work in (main, other):
        for job in work.jobs[1:]:
            job(work)
    if "x" in main.grads:
        for dy, weight in zip(dys, weights, strict=True):
            if weight is not None:
                main.grads["x"].addmm_(dy, weight.to(dy.dtype))
    return (main.grads, other.grads) if first == 0 else (other.grads, main.grads)
