"""When the CUDA kernels can run. Loads their library only for a tensor that they might serve."""

import torch
from torch import Tensor

from .. import cuda_library
from .triton_runtime import LARGEST_RANK, LARGEST_SUB_RANK, capability


def refusal(x: Tensor, rank: int, sub_rank: int) -> str | None:
    """Why the CUDA kernels cannot run on x, or None."""
    if (error := cuda_library.load_error()) is not None:
        return error
    if x.device.type != cuda_library.device_type():
        return "it needs an NVIDIA GPU"
    if x.is_cuda:
        if capability(x.device) < (8, 0):
            return "it needs a GPU of compute capability 8.0 or more"
        if not cuda_library.built_for(x.device.index):
            return "its build has no code for sm_{}{}; add it to TORCH_CUDA_ARCH_LIST".format(*capability(x.device))
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it does not support {x.dtype}"
    if rank > LARGEST_RANK or sub_rank > LARGEST_SUB_RANK:
        return f"it supports r up to {LARGEST_RANK} and sub_rank up to {LARGEST_SUB_RANK}"
    return None
