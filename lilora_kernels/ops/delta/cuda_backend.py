"""Calls the CUDA kernels of `delta`: one launch each way, or one for each phase."""

import torch
from torch import Tensor

from ..barrier import barrier_state
from ..call import DIFFERENTIABLE, Call
from ..philox import keep_scale, threshold


def forward(x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    return run_forward(x, None, call, one_launch=True)


def backward(dy: Tensor, x: Tensor | None, h: Tensor | None, call: Call, needs: frozenset[str]) -> dict[str, Tensor]:
    return run_backward(dy, x, h, call, needs, one_launch=True)


def rows(device: torch.device) -> list[int]:
    """In the smaller tiles and in the larger ones (csrc/plan.h), and one row, for which cuBLAS has kernels of its own."""
    return [1, 64, 1024]


def run_forward(
    x: Tensor, bias: Tensor | None, call: Call, one_launch: bool, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y [M, N] = bias + delta, and h [M, R]; with weight [N, K] the base product is added too."""
    return torch.ops.lilora_cuda.delta_forward(
        rows_of(x), fitting(weight, x), fitting(bias, x), *operands(call, x),
        barrier_state(x.device) if one_launch else None, call.scaling, threshold(call.p), keep_scale(call.p), one_launch,
    )  # fmt: skip


def run_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    call: Call,
    needs: frozenset[str],
    one_launch: bool,
    weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """The gradients in `needs`; dx without the part through the base weight, unless weight [N, K] is given (on sm_90a)."""
    low, high = call.ranks or (0, call.a.shape[0])
    wanted = [name for name in DIFFERENTIABLE if name in needs]
    bits = sum(1 << DIFFERENTIABLE.index(name) for name in wanted)
    gradients = torch.ops.lilora_cuda.delta_backward(
        rows_of(dy), fitting(weight, dy), rows_of(x), None if h is None else h.to(dy.dtype).contiguous(),
        *operands(call, dy), barrier_state(dy.device) if one_launch else None,
        call.scaling, threshold(call.p), keep_scale(call.p), low, high, bits, one_launch,
    )  # fmt: skip
    found = dict(zip(wanted, gradients, strict=True))
    return {name: g if name == "x" else g.to(getattr(call, name).dtype) for name, g in found.items()}


def run_fused_forward(x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """y [M, N] = x W^T + bias + delta in one product on sm_90a, after the launch that makes h [M, R]."""
    return torch.ops.lilora_cuda.fused_linear_forward(
        rows_of(x), weight, fitting(bias, x), *operands(call, x), barrier_state(x.device),
        call.scaling, threshold(call.p), keep_scale(call.p),
    )  # fmt: skip


def rows_of(x: Tensor | None) -> Tensor | None:
    """Rows may lie anywhere, the elements of one next to each other."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()


def fitting(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """A parameter in x's dtype or fp32, the two that the kernels read."""
    if tensor is None:
        return None
    return tensor.contiguous() if tensor.dtype in (x.dtype, torch.float32) else tensor.contiguous().float()


def operands(call: Call, x: Tensor) -> tuple[Tensor | None, ...]:
    """a, b0, u, v, fusion, task, gate, gate_row and seed as the kernels take them."""
    parameters = (fitting(t, x) for t in (call.a, call.b0, call.u, call.v, call.fusion))
    task, gate_row = (None if t is None else t.contiguous() for t in (call.task, call.gate_row))
    return (*parameters, task, fitting(call.gate, x), gate_row, call.seed)
