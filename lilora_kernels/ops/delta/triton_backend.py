"""One launch for few rows, the library's products around our kernels for more, a launch for each job where these do not fit."""

import torch
from torch import Tensor

from ... import backends
from ..schema import AdapterArgs
from . import eager, task_rows, triton_configs
from .triton_bound import bind as bind
from .triton_bound import bind_gradients as bind_gradients
from .triton_jobs import Backward, Forward, run_jobs
from .triton_parts import TRITON


def forward(x: Tensor, adapter: AdapterArgs, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y [M, N] = bias + delta, and h [M, R]."""
    if (plan := plan_of(x, adapter)) == "composed":
        return eager.forward(x, adapter, bias, TRITON)
    return run_forward(x, bias, adapter, plan == "one_launch")


def backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, adapter: AdapterArgs, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients in `needs`; dx without the part through the base weight."""
    if (plan := plan_of(dy, adapter)) == "composed":
        return eager.backward(dy, x, h, adapter, needs, TRITON)
    return run_backward(dy, x, h, adapter, needs, plan == "one_launch")


def run_forward(x: Tensor, bias: Tensor | None, adapter: AdapterArgs, one_launch: bool) -> tuple[Tensor, Tensor]:
    work = Forward(x, bias, adapter, one_launch)
    run_jobs(work, one_launch)
    return work.y, work.h


def run_backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, adapter: AdapterArgs, needs: frozenset[str], one_launch: bool
) -> dict[str, Tensor]:
    work = Backward(dy, x, h, adapter, needs, one_launch)
    run_jobs(work, one_launch)
    return work.grads


def plan_of(rows: Tensor, adapter: AdapterArgs, few: str = "one_launch") -> str:
    """The plan that is forced, or the one for these rows [M, ...] of x or dy; `few`: that for few rows.

    Factors of no task at all are composed always: the kernels would read those of task 0.
    """
    if adapter.u is not None and adapter.u.numel() == 0:
        return "composed"
    if (plan := backends.forced["plan"]) is not None:
        return plan
    if rows.shape[0] <= backends.ONE_LAUNCH_ROWS:
        return few
    return "composed" if composes(rows, adapter) else "by_phase"


def composes(rows: Tensor, adapter: AdapterArgs) -> bool:
    """Whether the plan composed is the best for many rows [M, ...]: enough of them for each task, as far as the host knows."""
    if adapter.u is None:
        return True
    return task_rows.is_known(adapter) and TRITON.forms_m(rows, task_rows.layout_of(adapter), adapter)


def rows(device: torch.device) -> list[int]:
    return triton_configs.bucket_rows(device)
