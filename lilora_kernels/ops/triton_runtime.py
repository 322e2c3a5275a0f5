"""What the Triton backends share: when they can run, and launch configurations.

Imports Triton only for a tensor that it might serve: `import lilora_kernels` must not.
"""

import importlib
import importlib.util
import json
import math
import os
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..backends import ONE_LAUNCH_ROWS
from .schema import AdapterArgs

MANY_ROWS = {"composed": "for more of few tasks", "by_phase": "for more of many tasks"}
PLANS = {"one_launch": f"up to {ONE_LAUNCH_ROWS} rows", **MANY_ROWS}
PAIR_PLANS = {"by_phase": f"up to {ONE_LAUNCH_ROWS} rows and for more of many tasks", "composed": MANY_ROWS["composed"]}
CONFIGS = Path(__file__).parent.parent / "configs"
LARGEST_RANK, LARGEST_SUB_RANK = 256, 128
PLANE_BYTES = 1 << 28  # how much memory the partial sums of du may take before chunks of rows grow

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def refusal(x: Tensor, rank: int, sub_rank: int) -> str | None:
    """Why the Triton kernels cannot run on x, or None."""
    if not installed():
        return "triton is not installed"
    reason = None
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    if INTERPRETED:
        dtypes = dtypes[:2]  # the interpreter computes bfloat16 wrongly
    elif x.device.type != "cuda" or torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    else:
        reason = old_gpu(x.device)
    if (reason := reason or import_fault()) is not None:
        return reason
    if x.dtype not in dtypes:
        return f"it does not support {x.dtype}" + (" in the interpreter" if INTERPRETED else "")
    if rank > LARGEST_RANK or sub_rank > LARGEST_SUB_RANK:
        return f"it supports r up to {LARGEST_RANK} and sub_rank up to {LARGEST_SUB_RANK}"
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
def processors(device: torch.device) -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def padded(size: int) -> int:
    """A tile edge that holds `size`: a power of two of at least 16."""
    return max(16, 1 << (size - 1).bit_length())


# --- launch configurations -----------------------------------------------------------------------------------------


@cache
def table(names: tuple[str, ...]) -> dict[str, dict[str, list[dict]]]:
    """The first of configs/<name>.json that exists: {one_launch | by_phase: {forward | backward: buckets}}."""
    path = next(path for name in (*names, "default") if (path := CONFIGS / f"{name}.json").is_file())
    return json.loads(path.read_text())


@cache
def table_names(device: torch.device) -> tuple[str, ...]:
    """Tuned for this very GPU before made for its architecture."""
    if device.type != "cuda":
        return ()
    return torch.cuda.get_device_name(device).replace(" ", "_"), "sm_{}{}".format(*capability(device))


class Configuration(dict):
    """Of a kernel for calls of one kind. `launches` belongs to the backend, which makes each launch of it once."""

    def __init__(self, sizes: dict) -> None:
        super().__init__(sizes)
        self.launches = {}


def config(kernel: str, one_launch: bool, x: Tensor, adapter: AdapterArgs) -> Configuration:
    """The launch configuration of "forward" or "backward" for the number of rows of x: that of the nearest bucket."""
    names, plan = table_names(x.device), "one_launch" if one_launch else "by_phase"
    masters = max([t.element_size() for t in (x, *adapter[:4]) if t is not None])
    at = _nearest(names, plan, kernel, x.shape[0])
    return _fitted(names, plan, kernel, at, x.element_size(), masters, padded(adapter.a.shape[0]))


@cache
def _fitted(
    names: tuple[str, ...], plan: str, kernel: str, at: int, activation: int, parameter: int, block_r: int
) -> Configuration:
    return Configuration(fitted(table(names)[plan][kernel][at], activation, parameter, block_r))


@lru_cache(1 << 14)
def _nearest(names: tuple[str, ...], plan: str, kernel: str, rows: int) -> int:
    return nearest(tuple(bucket["rows"] for bucket in table(names)[plan][kernel]), rows)


def bucket_rows(device: torch.device) -> list[int]:
    """Numbers of rows that together meet every configuration: their own, and those where `linear` changes its plan.

    One row is among them because cuBLAS has kernels of its own for it.
    """
    plans = table(table_names(device)).values()
    own = {bucket["rows"] for kernels in plans for buckets in kernels.values() for bucket in buckets}
    return sorted(own | {1, ONE_LAUNCH_ROWS, ONE_LAUNCH_ROWS + 1})


def nearest(buckets: tuple[int, ...], rows: int) -> int:
    """Which of the numbers of rows is nearest, on a logarithmic scale."""
    return min(range(len(buckets)), key=lambda at: abs(math.log2(buckets[at]) - math.log2(max(rows, 1))))


def fitted(bucket: dict, activation: int, parameter: int, block_r: int) -> dict:
    """A configuration made for 2-byte elements and ranks up to 128, with smaller tiles for more.

    activation and parameter: bytes of an element of x, and of the widest of x and the parameters.
    """
    narrower = (activation > 2) + (block_r > 128)
    shallower = parameter > activation  # fp32 masters fill the stages of a pipeline

    def fit(sizes: dict) -> dict:
        fits = {name: max(16, size >> narrower) for name, size in sizes.items() if name.startswith("BLOCK_")}
        if shallower and "num_stages" in sizes:
            fits["num_stages"] = max(1, sizes["num_stages"] - 1)
        return sizes | fits

    if narrower or shallower:
        bucket = {name: value for name, value in bucket.items() if name != "PROGRAMS"}
    phases = {phase: fit(sizes) for phase, sizes in bucket.get("phases", {}).items()}
    return {name: value for name, value in fit(bucket).items() if name != "rows"} | {"phases": phases}


def phase_config(config: dict, first: int, last: int, pair: bool = False) -> dict[str, int]:
    """The constants of one launch. A phase that runs alone may have some of its own, and others when it serves a pair."""
    own = {}
    if first == last:
        own = config["phases"].get(f"{first}-pair" if pair else str(first), {})
    return {name: value for name, value in config.items() if name != "phases"} | own
