"""`lilora::delta`: schema, fake, autograd and the choice of a backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from .. import cuda_runtime, triton_runtime
from ..call import DIFFERENTIABLE, Call
from ..checks import check_delta
from . import eager

backends.register(
    "delta", "eager", backends.Implementation(eager.forward, eager.backward, lambda *_: None, "torch operations")
)
backends.register(
    "delta",
    "cuda",
    backends.lazy("lilora_kernels.ops.delta.cuda_backend", cuda_runtime.refusal, "one launch each way"),
)
backends.register(
    "delta",
    "triton",
    backends.lazy(
        "lilora_kernels.ops.delta.triton_backend",
        triton_runtime.refusal,
        "one launch each way",
    ),
)


@torch.library.custom_op("lilora::delta", mutates_args=())
def delta(
    x: Tensor,
    a: Tensor,
    b0: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    fusion: Tensor | None,
    task: Tensor | None,
    gate: Tensor | None,
    gate_row: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    p: float,
    ranks: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """(y [M, N], h [M, R]) in x's dtype; h = D(x) A^T is saved for backward and not differentiable."""
    check_delta("lilora::delta", x, a, b0, u, v, fusion, task, gate, gate_row, seed, p, ranks)
    call = Call(a, b0, u, v, fusion, task, gate, gate_row, seed, scaling, p, ranks)
    return backends.choose("delta", x, *call.rank_sizes).forward(x, call)


@delta.register_fake
def _(x, a, b0, u, v, fusion, task, gate, gate_row, seed, scaling, p, ranks):
    check_delta("lilora::delta", x, a, b0, u, v, fusion, task, gate, gate_row, seed, p, ranks)
    return x.new_empty(x.shape[0], b0.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("lilora::delta_backward", mutates_args=())
def delta_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    a: Tensor,
    b0: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    fusion: Tensor | None,
    task: Tensor | None,
    gate: Tensor | None,
    gate_row: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    p: float,
    ranks: Sequence[int] | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients asked for by `needs` (order: call.DIFFERENTIABLE); x is read for da, h for all but dx and da."""
    call = Call(a, b0, u, v, fusion, task, gate, gate_row, seed, scaling, p, ranks)
    names = wanted(needs)
    grads = backends.choose("delta", dy, *call.rank_sizes).backward(dy, x, h, call, frozenset(names))
    return [grads[name] for name in names]


@delta_backward.register_fake
def _(dy, x, h, a, b0, u, v, fusion, task, gate, gate_row, seed, scaling, p, ranks, needs):
    return empty_gradients(dy, a, {"b0": b0, "u": u, "v": v, "fusion": fusion, "gate": gate}, needs)


def wanted(needs: Sequence[bool]) -> list[str]:
    return [name for name, need in zip(DIFFERENTIABLE, needs, strict=True) if need]


def empty_gradients(dy: Tensor, a: Tensor, parameters: dict[str, Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    shapes = {"x": lambda: dy.new_empty(dy.shape[0], a.shape[1]), "a": lambda: a.new_empty(a.shape)}
    return [
        shapes[name]() if name in shapes else parameters[name].new_empty(parameters[name].shape)
        for name in wanted(needs)
    ]


def save(ctx, x: Tensor, h: Tensor, needs: Sequence[bool], tensors: Sequence[Tensor | None]) -> None:
    """Keep x only for da and h only for the gradients that read it."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(h)
    ctx.needs = list(needs)
    ctx.save_for_backward(x if needs[1] else None, h if any(needs[2:]) else None, *tensors)


def _setup_context(ctx, inputs, output):
    x, *tensors, ctx.scaling, ctx.p, ctx.ranks = inputs
    save(ctx, x, output[1], ctx.needs_input_grad[:6] + ctx.needs_input_grad[7:8], tensors)


def _backward(ctx, dy, _):
    if dy is None or not any(ctx.needs):
        return (None,) * 13
    x, h, *tensors = ctx.saved_tensors
    grads = delta_backward(dy, x, h, *tensors, ctx.scaling, ctx.p, ctx.ranks, ctx.needs)
    named = dict(zip(wanted(ctx.needs), grads, strict=True))
    return (*(named.get(name) for name in DIFFERENTIABLE[:6]), None, named.get("gate"), None, None, None, None, None)


delta.register_autograd(_backward, setup_context=_setup_context)
