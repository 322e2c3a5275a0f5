"""Calls the CUDA kernels of `delta`: one launch each way, or one for each phase.

The kernels read parameters in x's dtype: those of another one are cast before, as the formula does. Gradients of parameters
in fp32 are sums in fp32 that nothing has rounded.
"""

import torch
from torch import Tensor

from ... import backends
from .. import triton_runtime
from ..barrier import barrier_state
from ..philox import keep_scale, threshold
from ..schema import DIFFERENTIABLE, AdapterArgs
from . import eager, triton_configs


def forward(x: Tensor, adapter: AdapterArgs) -> tuple[Tensor, Tensor]:
    if (parts := composed_parts(x, adapter)) is not None:
        return eager.forward(x, adapter, None, parts)
    return run_forward(x, None, adapter, backends.forced["plan"] != "by_phase")


def backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, adapter: AdapterArgs, needs: frozenset[str]
) -> dict[str, Tensor]:
    if (parts := composed_parts(dy, adapter)) is not None:
        return eager.backward(dy, x, h, adapter, needs, parts)
    return run_backward(dy, x, h, adapter, needs, backends.forced["plan"] != "by_phase")


def rows(device: torch.device) -> list[int]:
    """In the smaller tiles and in the larger ones (csrc/plan.h), one row, for which cuBLAS has kernels of its own, and those of
    the Triton kernels in the plan composed."""
    others = triton_configs.bucket_rows(device) if triton_runtime.installed() else []
    return sorted({1, 64, 1024, *(n for n in others if n > backends.ONE_LAUNCH_ROWS)})


def composed_parts(rows: Tensor, adapter: AdapterArgs) -> eager.Parts | None:
    """The steps of the plan composed where rows [M, ...] of x or dy take it: forced, and for many rows of few tasks.

    Triton's kernels where it can run; else torch operations, which nothing but an order takes.
    """
    plan, few = backends.forced["plan"], rows.shape[0] <= backends.ONE_LAUNCH_ROWS
    if plan != "composed" and (plan is not None or few):
        return None
    if triton_runtime.unsupported_reason(rows, *adapter.rank_sizes) is not None:
        return None if plan is None else eager.TORCH
    from . import triton_backend  # imports Triton

    return triton_backend.TRITON if plan is not None or triton_backend.composes(rows, adapter) else None


def run_forward(
    x: Tensor, bias: Tensor | None, adapter: AdapterArgs, one_launch: bool, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y [M, N] = bias + delta, and h [M, R]; with weight [N, K] the base product is added too."""
    return torch.ops.lilora_cuda.delta_forward(
        rows_of(x), None if weight is None else rows_of(weight.to(x.dtype)), cast_parameter(bias, x), *operands(adapter, x),
        barrier_state(x.device) if one_launch else None, adapter.scaling, threshold(adapter.p), keep_scale(adapter.p), one_launch,
    )  # fmt: skip


def run_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    adapter: AdapterArgs,
    needs: frozenset[str],
    one_launch: bool,
    weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """The gradients in `needs`; dx without the part through the base weight, unless weight [N, K] is given (on sm_90a)."""
    low, high = adapter.ranks or (0, adapter.a.shape[0])
    wanted = [name for name in DIFFERENTIABLE if name in needs]
    bits = {name: 1 << DIFFERENTIABLE.index(name) for name in wanted}
    wide = sum(bit for name, bit in bits.items() if name != "x" and getattr(adapter, name).dtype != dy.dtype)
    gradients = torch.ops.lilora_cuda.delta_backward(
        rows_of(dy), None if weight is None else rows_of(weight.to(dy.dtype)), rows_of(x),
        None if h is None else h.to(dy.dtype).contiguous(),
        *operands(adapter, dy), barrier_state(dy.device) if one_launch else None,
        adapter.scaling, threshold(adapter.p), keep_scale(adapter.p), low, high, sum(bits.values()), wide, one_launch,
    )  # fmt: skip
    found = dict(zip(wanted, gradients, strict=True))
    return {name: g if name == "x" else like(g, getattr(adapter, name)) for name, g in found.items()}


def like(gradient: Tensor, parameter: Tensor) -> Tensor:
    return gradient.to(parameter.dtype).view(parameter.shape)


def run_fused_forward(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: AdapterArgs) -> tuple[Tensor, Tensor]:
    """y [M, N] = x W^T + bias + delta in one product on sm_90a, after the launches that make h [M, R]."""
    return torch.ops.lilora_cuda.fused_linear_forward(
        rows_of(x), rows_of(weight.to(x.dtype)), cast_parameter(bias, x), *operands(adapter, x), adapter.scaling,
        threshold(adapter.p), keep_scale(adapter.p),
    )  # fmt: skip


def rows_of(x: Tensor | None) -> Tensor | None:
    """Rows may lie anywhere, the elements of one next to each other."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()


def cast_parameter(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """A parameter as the kernels read it."""
    return None if tensor is None else tensor.to(x.dtype).contiguous()


def operands(adapter: AdapterArgs, x: Tensor) -> tuple[Tensor | None, ...]:
    """a, b0, u, v, fusion, task, gate, gate_row and seed as the kernels take them."""
    of_tasks = (t if t is None or t.dim() == 3 else t.unsqueeze(0) for t in (adapter.u, adapter.v))
    parameters = (cast_parameter(t, x) for t in (adapter.a, adapter.b0, *of_tasks, adapter.fusion))
    task, gate_row = (None if t is None else t.contiguous() for t in (adapter.task, adapter.gate_row))
    return (*parameters, task, cast_parameter(adapter.gate, x), gate_row, adapter.seed)
