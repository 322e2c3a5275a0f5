"""`lilora::linear`: the frozen base linear and its adapter in one operation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from .. import cuda_runtime, triton_runtime
from ..call import DIFFERENTIABLE, Call
from ..checks import check_delta, check_linear
from ..delta.register import empty_gradients, save, wanted
from . import eager

backends.register(
    "linear", "eager", backends.Implementation(eager.forward, eager.backward, lambda *_: None, "torch operations")
)
backends.register(
    "linear",
    "cuda",
    backends.lazy(
        "lilora_kernels.ops.linear.cuda_backend",
        cuda_runtime.refusal,
        "base included up to 64 rows, then cuBLAS and one launch each way, one per phase beyond 255 rows",
        ("decode", "one launch", "by phase", "fused"),
    ),
)
backends.register(
    "linear",
    "triton",
    backends.lazy(
        "lilora_kernels.ops.linear.triton_backend",
        triton_runtime.refusal,
        "cuBLAS and one launch each way up to 255 rows, one per phase beyond",
        ("one launch", "by phase"),
    ),
)


@torch.library.custom_op("lilora::linear", mutates_args=())
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    """(y [M, N], h [M, R]) in x's dtype. weight and bias are frozen: they get no gradient."""
    check_delta("lilora::linear", x, a, b0, u, v, fusion, task, gate, gate_row, seed, p, ranks)
    check_linear("lilora::linear", x, weight, bias, b0)
    call = Call(a, b0, u, v, fusion, task, gate, gate_row, seed, scaling, p, ranks)
    return backends.choose("linear", x, *call.rank_sizes).forward(x, weight, bias, call)


@linear.register_fake
def _(x, weight, bias, a, b0, u, v, fusion, task, gate, gate_row, seed, scaling, p, ranks):
    check_delta("lilora::linear", x, a, b0, u, v, fusion, task, gate, gate_row, seed, p, ranks)
    check_linear("lilora::linear", x, weight, bias, b0)
    return x.new_empty(x.shape[0], b0.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("lilora::linear_backward", mutates_args=())
def linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
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
    """As `delta_backward`, with dx through weight added; weight is read for dx only."""
    call = Call(a, b0, u, v, fusion, task, gate, gate_row, seed, scaling, p, ranks)
    names = wanted(needs)
    grads = backends.choose("linear", dy, *call.rank_sizes).backward(dy, x, weight, h, call, frozenset(names))
    return [grads[name] for name in names]


@linear_backward.register_fake
def _(dy, x, weight, h, a, b0, u, v, fusion, task, gate, gate_row, seed, scaling, p, ranks, needs):
    return empty_gradients(dy, a, {"b0": b0, "u": u, "v": v, "fusion": fusion, "gate": gate}, needs)


def _setup_context(ctx, inputs, output):
    x, weight, _, *tensors, ctx.scaling, ctx.p, ctx.ranks = inputs
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise ValueError(
            "lilora::linear: weight or bias requires a gradient, but the base is frozen here; "
            "use F.linear(x, weight, bias) + delta(...) to train it"
        )
    needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:8], ctx.needs_input_grad[9])
    save(ctx, x, output[1], needs, [weight if needs[0] else None, *tensors])


def _backward(ctx, dy, _):
    if dy is None or not any(ctx.needs):
        return (None,) * 15
    x, h, weight, *tensors = ctx.saved_tensors
    grads = linear_backward(dy, x, weight, h, *tensors, ctx.scaling, ctx.p, ctx.ranks, ctx.needs)
    named = dict(zip(wanted(ctx.needs), grads, strict=True))
    adapter = (named.get(name) for name in DIFFERENTIABLE[1:6])
    return (named.get("x"), None, None, *adapter, None, named.get("gate"), None, None, None, None, None)


linear.register_autograd(_backward, setup_context=_setup_context)
