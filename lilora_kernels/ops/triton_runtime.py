"""What the Triton backends share: when they can run, launch configurations, and the state of the grid barrier.

Imports Triton nowhere: `import lilora_kernels` must not.
"""

import importlib.util
import json
import math
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

CONFIGS = Path(__file__).parent.parent / "configs"
LARGEST_RANK, LARGEST_SUB_RANK = 256, 128
PLANE_BYTES = 1 << 28  # how much memory the partial sums of du may take before chunks of rows grow
PROGRAMS_PER_SM = 4  # of launches without a barrier
ONE_LAUNCH_ROWS = 255  # up to here `linear` runs all phases of its adapter in one launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def refusal(x: Tensor, rank: int, sub_rank: int) -> str | None:
    """Why the Triton kernels cannot run on x, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    if INTERPRETED:
        dtypes = dtypes[:2]  # the interpreter computes bfloat16 wrongly
    elif x.device.type != "cuda" or torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    elif capability(x.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more"
    if x.dtype not in dtypes:
        return f"it does not support {x.dtype}" + (" in the interpreter" if INTERPRETED else "")
    if rank > LARGEST_RANK or sub_rank > LARGEST_SUB_RANK:
        return f"it supports r up to {LARGEST_RANK} and sub_rank up to {LARGEST_SUB_RANK}"
    return None


@cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def processors(device: torch.device) -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def padded(size: int) -> int:
    """A tile edge that holds `size`: a power of two of at least 16."""
    return max(16, 1 << (size - 1).bit_length())


# --- launch configurations -----------------------------------------------------------------------------------------


@cache
def table(device: torch.device) -> dict[str, list[dict[str, int]]]:
    """configs/<device name>.json, else configs/sm_<capability>.json, else configs/default.json."""
    names = ["default"]
    if device.type == "cuda":
        major, minor = capability(device)
        names = [torch.cuda.get_device_name(device).replace(" ", "_"), f"sm_{major}{minor}", "default"]
    path = next(path for name in names if (path := CONFIGS / f"{name}.json").is_file())
    return json.loads(path.read_text())


def config(kernel: str, x: Tensor, block_r: int) -> dict[str, int]:
    """The launch configuration of "forward" or "backward" for the number of rows of x: that of the nearest bucket."""
    return fitted(nearest(table(x.device)[kernel], x.shape[0]), x.dtype, block_r)


def nearest(buckets: list[dict[str, int]], rows: int) -> dict[str, int]:
    """The bucket whose `rows` is nearest to the number of rows, on a logarithmic scale."""
    return min(buckets, key=lambda bucket: abs(math.log2(bucket["rows"]) - math.log2(max(rows, 1))))


def fitted(bucket: dict[str, int], dtype: torch.dtype, block_r: int) -> dict[str, int]:
    """A configuration made for 16-bit inputs and ranks up to 128, with smaller tiles for wider ones."""
    sizes = {name: value for name, value in bucket.items() if name != "rows"}
    for _ in range((dtype == torch.float32) + (block_r > 128)):
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
            sizes[name] = max(16, sizes[name] // 2)
    return sizes


# --- the barrier ---------------------------------------------------------------------------------------------------

_states: dict[tuple[torch.device, int], Tensor] = {}


def barrier_state(device: torch.device) -> Tensor:
    """Two int32 zeros for the barrier of one launch: kept per stream, as launches of a stream follow one another.

    A captured graph gets its own: it may be replayed on any stream.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(2, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    if (device, stream) not in _states:
        _states[device, stream] = torch.zeros(2, dtype=torch.int32, device=device)
    return _states[device, stream]
