"""What the Triton backends share: when they can run.

Imports Triton only for a tensor that it might serve: `import lilora_kernels` must not.
"""

import importlib
import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from ..backends import ONE_LAUNCH_ROWS

MANY_ROWS = {"composed": "for more of few tasks", "by_phase": "for more of many tasks"}
PLANS = {"one_launch": f"up to {ONE_LAUNCH_ROWS} rows", **MANY_ROWS}
PAIR_PLANS = {"by_phase": f"up to {ONE_LAUNCH_ROWS} rows and for more of many tasks", "composed": MANY_ROWS["composed"]}
LARGEST_RANK, LARGEST_SUB_RANK = 256, 128
NVIDIA = "it needs an NVIDIA GPU"
LEAST_SHARED_MEMORY = 99 * 1024  # bytes that a block may have on every GPU that the kernels run on

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unsupported_reason(x: Tensor, rank: int, sub_rank: int) -> str | None:
    """Why the Triton kernels cannot run on x, or None."""
    if not installed():
        return "triton is not installed"
    reason = None
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    if INTERPRETED:
        dtypes = dtypes[:2]  # the interpreter computes bfloat16 wrongly
    elif x.device.type != "cuda" or torch.version.hip is not None:
        return NVIDIA
    else:
        reason = old_gpu(x.device)
    if (reason := reason or import_fault()) is not None:
        return reason
    if x.dtype not in dtypes:
        return f"it does not support {x.dtype}" + (" in the interpreter" if INTERPRETED else "")
    if rank > LARGEST_RANK or sub_rank > LARGEST_SUB_RANK:
        return f"it supports r up to {LARGEST_RANK} and sub_rank up to {LARGEST_SUB_RANK}"
    factor = 4 * padded(rank) * padded(sub_rank)  # bytes of V_t in fp32
    if not INTERPRETED and factor > LEAST_SHARED_MEMORY and factor > shared_memory(x.device):
        return f"r {rank} with sub_rank {sub_rank} takes more shared memory than a block of this GPU has"
    return None


@cache
def installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a stand-in that another package has left in sys.modules
        return False


@cache
def import_fault() -> str | None:
    """Why the Triton that is installed cannot be used here, or None. Imports it."""
    names = ("triton", "numpy") if INTERPRETED else ("triton",)
    try:
        versions = [importlib.import_module(name).__version__ for name in names]
    except Exception as error:
        return f"triton cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})"
    return interpreter_fault(*versions) if INTERPRETED else None


def interpreter_fault(triton: str, numpy: str) -> str | None:
    """Why the interpreter of this Triton cannot run with this numpy, or None. numpy 2.4 makes no integer of an array [1]."""
    if release(triton) < (3, 7) and release(numpy) >= (2, 4):
        return (
            f"the interpreter of triton {triton} needs numpy below 2.4, and numpy {numpy} is installed; "
            "install numpy<2.4 or triton>=3.7"
        )
    return None


def release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def old_gpu(device: torch.device) -> str | None:
    """Why no kernel of ours runs on a GPU, or None; a GPU that torch cannot speak to is no error but a reason."""
    try:
        recent = capability(device) >= (8, 0)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        return " ".join(str(error).split())
    return None if recent else "it needs a GPU of compute capability 8.0 or more"


@cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def device_names(device: torch.device) -> tuple[str, ...]:
    """Of a GPU: its own, and its architecture's."""
    if device.type != "cuda":
        return ()
    return torch.cuda.get_device_name(device).replace(" ", "_"), "sm_{}{}".format(*capability(device))


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@cache
def processors(device: torch.device) -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def padded(size: int) -> int:
    """A tile edge that holds `size`: a power of two of at least 16."""
    return max(16, 1 << (size - 1).bit_length())
