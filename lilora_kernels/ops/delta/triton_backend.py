"""Launches the Triton kernels of `delta`: all phases in one launch, or one launch for each phase."""

import torch
from torch import Tensor

from .. import triton_runtime as runtime
from ..call import Call
from ..philox import keep_scale, threshold
from . import triton_kernels as kernels


def forward(x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    return run_forward(x, None, call, one_launch=True)


def backward(dy: Tensor, x: Tensor | None, h: Tensor | None, call: Call, needs: frozenset[str]) -> dict[str, Tensor]:
    return run_backward(dy, x, h, call, needs, one_launch=True)


def run_forward(x: Tensor, bias: Tensor | None, call: Call, one_launch: bool) -> tuple[Tensor, Tensor]:
    """y [M, N] = bias + delta, and h [M, R]."""
    rows, columns = x.shape
    outputs, rank = call.b0.shape
    sizes, sub_rank, tasks = rank_sizes(call)
    x = x if x.stride(1) == 1 else x.contiguous()
    config = runtime.config("forward", one_launch, x, call)
    split = config["SPLIT_K"] = max(1, min(config["SPLIT_K"], columns // config["BLOCK_K"]))
    y, h = x.new_empty(rows, outputs), x.new_empty(rows, rank)
    z = None if call.u is None else x.new_empty(rows, sub_rank)
    planes = None if split == 1 else x.new_empty(split, rows, rank, dtype=torch.float32)
    a, b0, u, v, fusion, task, gate, gate_row, bias = map(
        contiguous, (call.a, call.b0, call.u, call.v, call.fusion, call.task, call.gate, call.gate_row, bias)
    )
    drop_below = threshold(call.p)

    def launch(first: int, last: int) -> None:
        run(
            kernels.delta_forward, x.device, first, last,
            (x, a, b0, u, v, fusion, task, gate, gate_row, bias, call.seed if drop_below else None, h, z, planes, y),
            (rows, columns, outputs, tasks, x.stride(0), call.scaling, drop_below, keep_scale(call.p)),
            {**sizes, **runtime.phase_config(config, first, last)},
        )  # fmt: skip

    if rows == 0:
        return y, h
    phases = [0, 2] if split == 1 else [0, 1, 2]
    if one_launch:
        launch(0, 2)
    else:
        for phase in phases:
            launch(phase, phase)
    return y, h


def run_backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, call: Call, needs: frozenset[str], one_launch: bool
) -> dict[str, Tensor]:
    """The gradients in `needs`; dx without the part through the base weight."""
    rows, outputs = dy.shape
    rank, columns = call.a.shape
    sizes, sub_rank, tasks = rank_sizes(call)
    dy = dy.contiguous()
    x = x if x is None or x.stride(1) == 1 else x.contiguous()
    config = runtime.config("backward", one_launch, dy, call)
    split = config["SPLIT_N"] = max(1, min(config["SPLIT_N"], outputs // config["BLOCK_N"]))
    while "u" in needs and config["CHUNK"] < rows and plane_bytes(rows, config["CHUNK"], call.u) > runtime.PLANE_BYTES:
        config["CHUNK"] *= 2
    chunks = -(-rows // config["CHUNK"])
    inputs = {name: contiguous(getattr(call, name)) for name in ("a", "b0", "u", "v", "fusion", "gate")}
    grads = {name: torch.empty_like(inputs[name]) for name in needs - {"x"}}
    if "x" in needs:
        grads["x"] = dy.new_empty(rows, columns)

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return dy.new_empty(shape, dtype=dtype) if wanted else None

    wants_dh = bool(needs & {"x", "a", "v", "fusion", "gate"})
    workspaces = (
        empty(wants_dh, rows, rank, dtype=dy.dtype),  # dh
        empty("gate" in needs, rows, rank),  # dq * h
        empty("v" in needs, rows, sub_rank, dtype=dy.dtype),  # s e Q
        empty("fusion" in needs, rows),
        empty(wants_dh and split > 1, split, rows, rank + sub_rank),
        empty("a" in needs, chunks, rank, columns),
        empty("b0" in needs, chunks, outputs, rank),
        empty("u" in needs, chunks, tasks, outputs, sub_rank),
        empty("v" in needs, chunks, tasks, sub_rank, rank),
        empty(call.task is not None and bool(needs & {"u", "v"}), chunks, tasks, dtype=torch.int32),
    )
    drop_below = threshold(call.p)
    gates = 0 if call.gate is None else call.gate.shape[0]
    low, high = call.ranks or (0, rank)

    def launch(first: int, last: int) -> None:
        run(
            kernels.delta_backward, dy.device, first, last,
            (
                dy, x, h, *(inputs[name] for name in ("a", "b0", "u", "v", "fusion")),
                contiguous(call.task), inputs["gate"], contiguous(call.gate_row), call.seed if drop_below else None,
                *(grads.get(name) for name in ("x", "a", "b0", "u", "v", "fusion", "gate")), *workspaces,
            ),
            (
                rows, columns, outputs, tasks, gates, 0 if x is None else x.stride(0),
                call.scaling, drop_below, keep_scale(call.p), low, high,
            ),
            {**sizes, **runtime.phase_config(config, first, last)},
        )  # fmt: skip

    if one_launch:
        launch(0, 3)
    else:
        for phase in backward_phases(needs, wants_dh and split > 1):
            launch(phase, phase)
    return grads


def backward_phases(needs: frozenset[str], split: bool) -> list[int]:
    phases = [0, 1] if split else [0]
    phases += [2] if needs else []
    return phases + ([3] if needs & {"a", "v"} else [])


def rank_sizes(call: Call) -> tuple[dict[str, int], int, int]:
    """The kernels' constants for R and S, S itself (0 without task factors) and the number of tasks."""
    rank = call.a.shape[0]
    tasks, _, sub_rank = (1, 0, 0) if call.u is None else call.u.shape
    return (
        {"R": rank, "S": sub_rank, "BLOCK_R": runtime.padded(rank), "BLOCK_S": runtime.padded(max(sub_rank, 1))},
        sub_rank,
        tasks,
    )


def plane_bytes(rows: int, chunk: int, u: Tensor) -> int:
    return -(-rows // chunk) * u.numel() * 4


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def run(kernel, device: torch.device, first: int, last: int, tensors: tuple, numbers: tuple, constants: dict) -> None:
    """One launch of the phases first..last. More than one phase needs all programs resident: one for each processor."""
    constants = {**constants, "FIRST": first, "LAST": last}
    state = runtime.barrier_state(device) if first < last else None
    if runtime.INTERPRETED:
        # Programs run one after another there: a barrier can wait for no more than one.
        kernel[(1 if first < last else 3,)](*tensors, state, *numbers, **constants)
        return
    with torch.cuda.device(device):
        programs = runtime.processors(device) * (1 if first < last else runtime.PROGRAMS_PER_SM)
        kernel[(programs,)](*tensors, state, *numbers, **constants, launch_cooperative_grid=first < last)
