"""Launches that cost nothing: what the backends with kernels of their own cost the host, on a machine without a GPU.

Tensors stay those of a CPU, and what kernels would write is left as it is. Triton compiles for sm_90 and launches by its own
launcher, over the libcuda of bench/pretended_gpu; the CUDA library is the emulated one of the tests. Asking a GPU for its
current stream, device and capability costs nothing here either.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from lilora_kernels import backends, cuda_library
from lilora_kernels.ops import triton_runtime

from .pretended_gpu.triton_launches import take_the_place_of_libcuda

CPU = -1  # the index of the device of CPU tensors


def install_triton() -> None:
    """From here on the Triton backend takes tensors of a CPU."""
    take_the_place_of_libcuda()
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.cuda.current_device = lambda: CPU
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    driver.set_active(CudaDriver())
    triton_runtime.processors = lambda device: 132
    for table in backends._table.values():
        if "triton" in table:
            table["triton"] = replace(table["triton"], unsupported_reason=lambda *_: None)


def install_cuda() -> None:
    """From here on the CUDA backend takes tensors of a CPU. Compiles the emulated library where it is not up to date."""
    os.environ["LILORA_EMULATION"] = "sm_90a"
    sys.path.append(str(Path(__file__).parents[1] / "tests/emulation"))
    import emulator

    emulator.build()
    if (error := cuda_library.load(emulator.LIBRARY)) is not None:
        raise RuntimeError(error)
    cuda_library.load_error = lambda: None
    device = emulator.Device()
    device(processors=132)
    device.launches_nothing()


INSTALL = {"eager": lambda: None, "triton": install_triton, "cuda": install_cuda}


def through(backend: str, run: Callable[[], object]) -> Callable[[], object]:
    """`run` with this backend selected, for less than what a context manager costs."""

    def selected() -> None:
        before, backends.forced["backend"] = backends.forced["backend"], backend
        try:
            run()
        finally:
            backends.forced["backend"] = before

    return selected
