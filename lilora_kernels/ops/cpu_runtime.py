"""When the CPU kernels can run, and their call."""

import torch
from torch import Tensor

from .. import backends, cpu_library
from .schema import AdapterArgs

DECODE_ROWS = 32  # the most that the kernels take: kMostRows of csrc/cpu/linear.cpp
PLANS = {"decode": f"up to {DECODE_ROWS} rows", "composed": "beyond"}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ABSENT = (0, 0)


def refusal(x: Tensor, rank: int, sub_rank: int) -> str | None:
    """Why the CPU kernels cannot run on x, or None."""
    if not x.is_cpu:
        return "it needs tensors on the CPU"
    if x.dtype not in TYPES:
        return f"it does not support {x.dtype}"
    library = cpu_library.load()
    return library if isinstance(library, str) else None


def forward(
    op: str, x: Tensor, adapter: AdapterArgs, weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """y [M, N] and h [M, R] by the plan decode; None where the composed plan has to run."""
    plan = backends.forced("plan")
    if plan == "composed":
        return None
    reason = unsupported(x, adapter, weight, bias)
    if reason is None:
        return decode(x, adapter, weight, bias)
    if plan is not None:
        raise backends.Unsupported(
            f"{op}: the plan {plan!r} cannot run here: {reason}; 'cpu' has {list(backends.plans(op)['cpu'])}"
        )
    return None


def unsupported(x: Tensor, adapter: AdapterArgs, weight: Tensor | None, bias: Tensor | None) -> str | None:
    if x.shape[0] > DECODE_ROWS:
        return f"it takes up to {DECODE_ROWS} rows, here are {x.shape[0]}"
    if adapter.p > 0:
        return "it has no dropout"
    for tensor in (weight, bias, *adapter[:8]):
        if tensor is None:
            continue
        if not tensor.is_contiguous():
            return "its parameters and ids must be contiguous"
        if tensor.dtype not in TYPES and tensor.dtype != torch.int32:
            return f"it does not support {tensor.dtype}"
    return None


def decode(x: Tensor, adapter: AdapterArgs, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """None for an id of no task or no gate: the composed plan says what is wrong."""
    a, b0, u, v, fusion, task, gate, gate_row, _, scaling, _, _ = adapter
    (rows, columns), (outputs, rank) = x.shape, b0.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    y, h = x.new_empty((rows, outputs)), x.new_empty((rows, rank))
    library = cpu_library.load()
    tasks, sub_rank = (1, 0) if u is None else (1 if u.dim() == 2 else u.shape[0], u.shape[-1])
    call = cpu_library.CALL.pack(
        rows, columns, outputs, rank, sub_rank, tasks, 1 if gate is None else gate.shape[0], x.stride(0),
        x.data_ptr(), TYPES[x.dtype], *operand(weight), *operand(bias), a.data_ptr(), TYPES[a.dtype],
        b0.data_ptr(), TYPES[b0.dtype], *operand(u), *operand(v), *operand(fusion), *operand(gate),
        0 if task is None else task.data_ptr(), 0 if gate_row is None else gate_row.data_ptr(), y.data_ptr(), h.data_ptr(),
        library.parallel_for, library.instructions, scaling,
    )  # fmt: skip
    return (y, h) if library.forward(call) == 0 else None


def operand(tensor: Tensor | None) -> tuple[int, int]:
    return ABSENT if tensor is None else (tensor.data_ptr(), TYPES[tensor.dtype])
