"""Five plans, by the number of rows, and for the fused product by the layer too.

decode: the kernels stream the base weight too. one_launch, composed and by_phase: the adapter's part is written and cuBLAS adds
the base's (beta = 1). fused (sm_90a): one product whose inner dimension has the adapter's steps too, forward and for dx.
"""

import torch
from torch import Tensor

from ... import backends, cuda_library
from .. import triton_runtime
from ..cuda_runtime import DECODE_CHOSEN, DECODE_ROWS, FUSED_ROWS
from ..delta import cuda_backend as delta
from ..delta import eager
from ..schema import AdapterArgs

SLOT_BYTES = 1 << 28  # how much memory the slots of the fused product may take


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: AdapterArgs) -> tuple[Tensor, Tensor]:
    plan = plan_of(x, weight, adapter, bias)
    if plan == "fused":
        return delta.run_fused_forward(x, weight, bias, adapter)
    weight = weight.to(x.dtype)
    if plan == "decode":
        return delta.run_forward(x, bias, adapter, False, weight)
    if plan == "composed":
        y, h = eager.forward(x, adapter, bias, delta.composed_parts(x, adapter))
    else:
        y, h = delta.run_forward(x, bias, adapter, plan == "one_launch")
    return y.addmm_(x, weight.T), h


def backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, h: Tensor | None, adapter: AdapterArgs, needs: frozenset[str]
) -> dict[str, Tensor]:
    plan = backends.forced["plan"]
    together = plan == "one_launch" or (plan != "by_phase" and dy.shape[0] <= backends.ONE_LAUNCH_ROWS)
    if "x" in needs and plan_of(dy, weight, adapter, forward=False) == "fused":
        return delta.run_backward(dy, x, h, adapter, needs, together, weight)
    if (parts := delta.composed_parts(dy, adapter)) is not None:
        grads = eager.backward(dy, x, h, adapter, needs, parts)
    else:
        grads = delta.run_backward(dy, x, h, adapter, needs, together)
    if "x" in needs:
        grads["x"].addmm_(dy, weight.to(dy.dtype))
    return grads


def plan_of(
    rows: Tensor, weight: Tensor, adapter: AdapterArgs, bias: Tensor | None = None, forward: bool = True
) -> str:
    """The plan that is forced, or the one for so many rows: of x, or of dy where not forward."""
    count, plan, reason = rows.shape[0], backends.forced["plan"], None
    if plan == "fused":
        reason = unsupported_call(rows, weight, adapter, bias)
    elif plan == "decode" and forward:
        reason = cannot_decode(rows, weight)
    if reason is not None:
        raise backends.Unsupported(
            f"linear: the plan {plan!r} cannot run here: {reason}; 'cuda' has {list(backends.plans('linear')['cuda'])}"
        )
    if plan is not None:
        return plan
    composes = delta.composed_parts(rows, adapter) is not None
    # In the fused product a NaN in one task's factors reaches other rows of its group: it is not taken for several unasked.
    several = adapter.task is not None and adapter.u is not None
    if count >= FUSED_ROWS and not (composes or several) and unsupported_call(rows, weight, adapter, bias) is None:
        return "fused"
    if composes:
        return "composed"
    if forward and count <= DECODE_CHOSEN and cannot_decode(rows, weight) is None:
        return "decode"
    return "one_launch" if count <= backends.ONE_LAUNCH_ROWS else "by_phase"


def cannot_decode(x: Tensor, weight: Tensor) -> str | None:
    """Why the base's weight cannot be streamed, or None."""
    rows, columns = x.shape
    if rows > DECODE_ROWS:
        return f"it takes up to {DECODE_ROWS} rows, here are {rows}"
    if columns % 8 or not (rows_begin_aligned(x) and (rows_begin_aligned(weight) or weight.dtype != x.dtype)):
        return "its x and base weight must have rows of a multiple of 8 elements that begin at multiples of 16 bytes"
    return None


def rows_begin_aligned(t: Tensor) -> bool:
    """Whether the rows [.., 8 i] of 16-bit elements begin at multiples of 16 bytes, as far as they are not copied first."""
    return t.data_ptr() % 16 == 0 and (t.is_contiguous() or t.stride(1) != 1 or t.stride(0) % 8 == 0)


def unsupported_call(rows: Tensor, weight: Tensor, adapter: AdapterArgs, bias: Tensor | None = None) -> str | None:
    """Why the fused product cannot run on x or dy [M, ...], or None."""
    if not on_hopper(rows.device):
        return "it needs a GPU of compute capability 9.0 and a build for 9.0a"
    rank, sub_rank = adapter.rank_sizes
    if 0 in (*rows.shape, *weight.shape) or any(size % 8 for size in (*weight.shape, rank, sub_rank)):
        return "its K, N, r and sub_rank must be multiples of 8, and there must be rows"
    given = (rows, weight, bias, adapter.a, adapter.b0, adapter.u)
    as_they_are = [t for t in given if t is not None and t.dtype == rows.dtype]  # what is cast becomes contiguous
    if any(
        t.data_ptr() % 16 or (t.dim() == 2 and (t.stride(1) != 1 or t.stride(0) % 8 or t.stride(0) == 0))
        for t in as_they_are
    ):
        return "its tensors must be rows that begin at multiples of 16 bytes"
    tasks = 0 if adapter.u is None else (1, *adapter.u.shape)[-3]
    if adapter.u is not None and tasks == 0:
        return "its factors must have a task"
    if tasks and torch.ops.lilora_cuda.slot_bytes(rows.shape[0], tasks, sub_rank) > SLOT_BYTES:
        return "its slots would take too much memory"
    return None


def rows(device: torch.device) -> list[int]:
    """Of every plan, and in both sizes of tiles."""
    few = {DECODE_CHOSEN, DECODE_ROWS, *delta.rows(device), backends.ONE_LAUNCH_ROWS, backends.ONE_LAUNCH_ROWS + 1}
    return sorted(few | ({FUSED_ROWS} if on_hopper(device) else set()))


def on_hopper(device: torch.device) -> bool:
    """Whether the fused product can run at all; the emulated device takes it too."""
    return cuda_library.has_hopper() and (device.type != "cuda" or triton_runtime.capability(device) == (9, 0))
