"""The compiled library of the operations `lilora_cuda::*`: loading it, why it is not there, and what it was built with."""

import functools
import importlib
import struct
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).parent / "lib" / "liblilora_cuda.so"
NO_BUILD = "this installation has no CUDA build; LILORA_CUDA=1 pip install --no-build-isolation . makes one"
OPERATIONS = ("delta_forward", "delta_backward", "missing_code")  # of every build


@functools.cache
def load_error() -> str | None:
    """Load the library, once per process; why its operations are missing in a few words, or None. Never raises."""
    return load(PATH)


def load(path: Path) -> str | None:
    """Load a library of operations; the loader's message in one line if it cannot be loaded, else None."""
    try:
        if truncated(path):
            raise OSError(f"{path} is truncated")
        torch.ops.load_library(path)
    except (FileNotFoundError, NotADirectoryError):
        return NO_BUILD
    except (OSError, RuntimeError) as error:
        # Newer versions of torch keep the loader's message in the cause.
        message = one_line(error.__cause__ or error)
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA ({message})"
        return message
    lacking = [name for name in OPERATIONS if not hasattr(torch.ops.lilora_cuda, name)]
    return f"{path} is of another version: it lacks {', '.join(lacking)}; build it again" if lacking else None


def one_line(error: object) -> str:
    return " ".join(str(error).split())


def truncated(path: Path) -> bool:
    """Whether an ELF file ends before its section table, the last part of it: to load it would kill the process."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF"):
        return False
    (table,), (size, entries) = struct.unpack_from("=Q", header, 40), struct.unpack_from("=HH", header, 58)
    return path.stat().st_size < table + size * entries


@functools.cache
def device_type() -> str:
    """The type of device that the loaded library computes on: cuda, or cpu for one that the tests made."""
    on_cpu = torch._C._dispatch_has_kernel_for_dispatch_key("lilora_cuda::delta_forward", "CPU")
    return "cpu" if on_cpu else "cuda"


@functools.cache
def missing_code(device: int) -> str | None:
    """Why a GPU cannot run the code of the loaded library, such as an old driver, or None. Asked once per process."""
    return one_line(torch.ops.lilora_cuda.missing_code(device)) or None


@functools.cache
def has_hopper() -> bool:
    """Whether the loaded library has the fused product of sm_90a."""
    return load_error() is None and hasattr(torch.ops.lilora_cuda, "fused_linear_forward")


def build_info() -> dict[str, Any]:
    """What the CUDA build was made with, whether or not the library loads.

    cuda (of nvcc) and torch (of the headers): versions, None without a CUDA build; architectures such as "9.0a" and
    "10.0+PTX"; flags of nvcc; hopper: whether the kernels for 9.0a alone are in; kernels: for each kernel and architecture the
    registers per thread, bytes spilled and bytes of static shared memory; reason: why there is no information, else None.
    """
    try:
        facts = importlib.import_module("._build_info", __package__).build_info()
    except ImportError as error:
        facts = {"cuda": None, "torch": None, "architectures": [], "flags": [], "hopper": False, "kernels": []}
        return {**facts, "reason": str(error) if PATH.exists() else NO_BUILD}
    return {**facts, "reason": None}
