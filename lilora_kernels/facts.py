"""What runs here: versions, devices, kernels."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import cpu_library, cuda_library
from .backends import unsupported_reasons
from .ops import cuda_runtime


def environment() -> dict[str, str]:
    """What the numbers were made with."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {os.cpu_count()} cores"
    packages = ("lilora-kernels", "torch", "triton", "transformers", "peft", "accelerate")
    return {"python": platform.python_version(), **{name: installed(name) for name in packages}, "device": device}


def cpu_build() -> str:
    """The instructions that the CPU kernels use here, or why they are missing."""
    kernels = cpu_library.load()
    return kernels if isinstance(kernels, str) else f"loaded, {cpu_library.INSTRUCTIONS[kernels.instructions - 1]}"


def cuda_build() -> dict[str, Any]:
    """What the CUDA kernels were built with, and whether they load and run on the first GPU, in words and as data."""
    built, error = cuda_library.build_info(), cuda_library.load_error()
    if error is None and torch.cuda.is_available():
        error = cuda_runtime.unusable(torch.device("cuda", 0))
    made = f"CUDA {built['cuda']}, torch {built['torch']}, for {', '.join(built['architectures'])}; "
    state = "loaded" if error is None else error
    return {"cuda build": (made if built["cuda"] else "") + state, "build_info": built}


def info() -> dict[str, Any]:
    """All of the above, and for every operation which backends can run here, or why one cannot."""
    facts: dict[str, Any] = {**environment(), "cpu build": cpu_build(), **cuda_build(), "backends": {}}
    on_gpu = torch.cuda.is_available()
    x = torch.empty(1, 1, device="cuda", dtype=torch.bfloat16) if on_gpu else torch.empty(1, 1)
    for op in ("delta", "linear", "delta_pair", "expert_linear", "rank_gate"):
        facts["backends"][op] = {
            name: "available" if why is None else why for name, why in unsupported_reasons(op, x, 128, 64).items()
        }
    return facts


def rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What `info` found, as lines of two columns."""
    plain = [(key, str(value)) for key, value in facts.items() if key not in ("backends", "build_info")]
    return plain + [(f"{op}: {name}", why) for op, found in facts["backends"].items() for name, why in found.items()]
