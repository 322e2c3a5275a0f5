"""When the CPU kernels can run, and their call."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import backends, cpu_library
from .schema import AdapterArgs

DECODE_ROWS = 64  # the most that the kernels take: kMostRows of csrc/cpu/decode.cpp
# Where the processor multiplies bf16 itself, which torch's products use and these do not: time over composed's up to 8 rows
# 0.4 to 1.1, at 16 rows 0.9 to 1.4, at 64 1.8 to 2.5 (bench/results/small-training/avx512.json).
BF16_ROWS = 8
PLANS = {
    "decode": f"up to {DECODE_ROWS} rows, in bf16 {BF16_ROWS} where the processor has bf16",
    "composed": "what no other takes",
}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ABSENT = (0, 0)
Side = tuple[AdapterArgs] | tuple[AdapterArgs, Tensor | None, Tensor | None]
"""An adapter, with the weight and bias of its base where that is part of the call. Two have the same x and tasks."""


def unsupported_reason(x: Tensor, rank: int, sub_rank: int) -> str | None:
    """Why the CPU kernels cannot run on x, or None."""
    if not x.is_cpu:
        return "it needs tensors on the CPU"
    if x.layout is not torch.strided or x.dtype not in TYPES:
        return f"it does not support {x.dtype}" if x.layout is torch.strided else f"it does not support {x.layout}"
    library = cpu_library.load()
    return library if isinstance(library, str) else None


def forward(op: str, x: Tensor, *sides: Side) -> list[tuple[Tensor, Tensor]] | None:
    """y [M, N] and h [M, R] of each side by the plan decode; None where the composed plan has to run."""
    plan = backends.forced["plan"]
    if plan not in (None, "decode") or (x.shape[0] > BF16_ROWS and x.shape[0] > most_rows(x.dtype) and plan is None):
        return None
    reason = None
    for side in sides:
        reason = reason or unsupported_call(x, *side)
    if reason is None:
        return decode(x, *sides)
    if plan is not None:
        raise backends.Unsupported(
            f"{op}: the plan {plan!r} cannot run here: {reason}; 'cpu' has {list(backends.plans(op)['cpu'])}"
        )
    return None


def most_rows(dtype: torch.dtype) -> int:
    """Up to so many rows decode is chosen where no plan is forced."""
    few = dtype is torch.bfloat16 and backends.forced["plan"] is None and cpu_library.load().has_bf16
    return BF16_ROWS if few else DECODE_ROWS


def unsupported_call(
    x: Tensor, adapter: AdapterArgs, weight: Tensor | None = None, bias: Tensor | None = None
) -> str | None:
    if x.shape[0] > DECODE_ROWS:
        return f"it takes up to {DECODE_ROWS} rows, here are {x.shape[0]}"
    if adapter.p > 0:
        return "it has no dropout"
    if x.numel() > 0 and x.data_ptr() == 0:
        return "x must have memory"
    if adapter.u is not None and adapter.u.numel() == 0:
        return "no task has factors"
    for tensor in (weight, bias, *adapter[:8]):
        if tensor is None:
            continue
        if not tensor.is_contiguous() or tensor.is_neg():
            return "its parameters and ids must be contiguous"
        if tensor.dtype not in TYPES and tensor is not adapter.task and tensor is not adapter.gate_row:
            return f"it does not support {tensor.dtype}"
        if tensor.data_ptr() == 0 and tensor.numel() > 0:
            return "its parameters and ids must have memory"
    return None


def decode(x: Tensor, *sides: Side) -> list[tuple[Tensor, Tensor]] | None:
    """None for an id of no task or no gate: the composed plan says what is wrong."""
    if x.stride(1) != 1 or x.is_neg():
        x = x.resolve_neg().contiguous()
    calls, results = b"", []
    for adapter, *base in sides:
        y, h = (x.new_empty((len(x), width)) for width in adapter.b0.shape)
        gate = adapter.gate
        calls += cpu_library.OF_CALL.pack(
            len(x), x.stride(0), x.data_ptr(), y.data_ptr(), h.data_ptr(), pointer(adapter.task), pointer(adapter.gate_row),
            *operand(gate), 1 if gate is None else len(gate),
        ) + packed(x, adapter, *base)  # fmt: skip
        results.append((y, h))
    return None if cpu_library.load().decode(calls, len(sides)) else results


def bind(
    x: Tensor, *of: tuple | Tensor | AdapterArgs | None, blocks: bool = False, more: Callable | None = None
) -> Callable | None:
    """bound(x, task, seed) -> y, see `Implementation`. of: what `forward` of the backend takes after x.

    More than `most_rows`: with `blocks` in blocks, of which a row's bits do not depend; else by `more`, bound alike.
    """
    one, sides = sides_of(of)
    if backends.forced["plan"] not in (None, "decode") or any(unsupported_call(x[:1], *side) for side in sides):
        return None
    most = most_rows(x.dtype)
    run, count, columns, size = cpu_library.load().decode, len(sides), x.shape[1], x.itemsize
    parameters = [(side[0].b0.shape[0], packed(x, *side)) for side in sides]

    def bound(x: Tensor, task: Tensor | None = None, seed: Tensor | None = None) -> Tensor | list[Tensor] | None:
        rows = x.shape[:-1].numel()
        if rows > most and not blocks:
            return more and more(x, task, seed)
        if task is not None and (task.shape != (rows,) or not task.is_contiguous()):
            return None
        if not x.is_contiguous() or x.is_neg():
            x = x.resolve_neg().contiguous()
        if x.data_ptr() == 0 and rows > 0:
            return None
        x_at, task_at = x.data_ptr(), pointer(task)
        ys = [x.new_empty((*x.shape[:-1], outputs)) for outputs, _ in parameters]
        for at in range(0, rows, DECODE_ROWS):
            calls = b""
            for y, (outputs, of_side) in zip(ys, parameters, strict=True):
                calls += cpu_library.OF_CALL.pack(
                    min(rows - at, DECODE_ROWS), columns, x_at + at * columns * size, y.data_ptr() + at * outputs * size, 0,
                    task_at and task_at + at * task.itemsize, 0, 0, 0, 1,
                ) + of_side  # fmt: skip
            if run(calls, count):
                return None
        return ys[0] if one else ys

    return bound


def sides_of(of: Sequence[tuple | Tensor | AdapterArgs | None]) -> tuple[bool, list[Side]]:
    """Whether it is one adapter, and each with its base; of: what `forward` of a backend takes after x."""
    *base, adapters = of
    one = isinstance(adapters, AdapterArgs)
    return one, [(adapters, *base)] if one else list(zip(adapters, *base, strict=True))


def packed(x: Tensor, adapter: AdapterArgs, weight: Tensor | None = None, bias: Tensor | None = None) -> bytes:
    """The part of a call that stays until parameters change."""
    a, b0, u, v, fusion, *_ = adapter
    library = cpu_library.load()
    tasks, sub_rank = (1, 0) if u is None else (1 if u.dim() == 2 else u.shape[0], u.shape[-1])
    operands = (number for tensor in (weight, bias, a, b0, u, v, fusion) for number in operand(tensor))
    return cpu_library.OF_PARAMETERS.pack(
        x.shape[1], *b0.shape, sub_rank, tasks, TYPES[x.dtype], *operands,
        library.parallel_for, library.instructions, adapter.scaling,
    )  # fmt: skip


def operand(tensor: Tensor | None) -> tuple[int, int]:
    return ABSENT if tensor is None else (tensor.data_ptr(), TYPES[tensor.dtype])


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
