"""When the CUDA kernels can run. Loads their library only for a tensor that they might serve."""

import torch
from torch import Tensor

from .. import cuda_library
from ..backends import ONE_LAUNCH_ROWS
from .triton_runtime import LARGEST_RANK, LARGEST_SUB_RANK, NVIDIA, capability, old_gpu

DECODE_ROWS = 64  # the most that the plan decode takes: kMostBaseRows of csrc/delta.h
# Up to here it is chosen. Modelled, not measured: bench.model, forward, time over that of one_launch for 16 rows of eight tasks:
# gate and up 0.85, down 0.69; for 32 rows 1.19 and 1.08.
DECODE_CHOSEN = 16
# From here on the plan fused is chosen on sm_90a where composed cannot be. Modelled, not measured: bench.model, both directions
# of gate and up, time over that of by_phase: 4096 rows 1.00, 8192 rows 0.98.
FUSED_ROWS = 4096
COMPOSED = "for more rows of few tasks, where Triton can run"
PLANS = {"one_launch": "for all rows else", "composed": COMPOSED, "by_phase": "if forced"}
LINEAR_PLANS = {
    "decode": f"up to {DECODE_CHOSEN} rows; forced up to {DECODE_ROWS}",
    "one_launch": f"up to {ONE_LAUNCH_ROWS} rows",
    "composed": COMPOSED,
    "by_phase": "for more",
    "fused": f"in its place for one task from {FUSED_ROWS} rows on sm_90a where it fits, as modelled and not yet measured",
}


def unsupported_reason(x: Tensor, rank: int, sub_rank: int) -> str | None:
    """Why the CUDA kernels cannot run on x, or None."""
    if torch.version.hip is not None:
        return NVIDIA
    if (error := cuda_library.load_error()) is not None:
        return error
    if x.device.type != cuda_library.device_type():
        return NVIDIA
    if x.is_cuda and (reason := unusable(x.device)) is not None:
        return reason
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes x in float16 or bfloat16, not in {str(x.dtype).removeprefix('torch.')}"
    if rank > LARGEST_RANK or sub_rank > LARGEST_SUB_RANK:
        return f"it supports r up to {LARGEST_RANK} and sub_rank up to {LARGEST_SUB_RANK}"
    return None


def unusable(device: torch.device) -> str | None:
    """Why the loaded library cannot compute on a GPU, or None."""
    if (reason := old_gpu(device)) is None and (missing := cuda_library.missing_code(device.index)) is not None:
        reason = "it cannot run on sm_{}{}: {}".format(*capability(device), missing)
    return reason
