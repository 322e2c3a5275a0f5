"""Builds the CUDA kernels of csrc/ for a CPU, and is the device that they run on."""

import ctypes
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
DEVICES = {"sm_80": [], "sm_90a": ["-DLILORA_EMULATE_WGMMA"]}  # the flags of each
NAME = os.environ.get("LILORA_EMULATION", "")
LIBRARY = ROOT / f"build/emulation/{NAME}/liblilora_cuda_emulated.so"
HERE = Path(__file__).parent
SOURCES = [*sorted((ROOT / "csrc").glob("*.cu")), ROOT / "csrc/register.cpp", ROOT / "csrc/hopper/slots.cu"]
SOURCES += [HERE / "emulated.cpp", HERE / "fused_linear.cpp"]
TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-clobbered"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DLILORA_HOPPER", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
FLAGS += ["-isystem", str(TORCH / "include"), "-isystem", str(TORCH / "include/torch/csrc/api/include")]


def build() -> None:
    """Compile the kernels for the CPU, unless that is up to date."""
    if NAME not in DEVICES:
        raise pytest.UsageError(f"LILORA_EMULATION is {NAME!r}; name the device to emulate: {' or '.join(DEVICES)}")
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    inputs = [*SOURCES, *(ROOT / "csrc").rglob("*.h"), HERE / "emulation.h", Path(__file__)]
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return

    def compiled(source: Path) -> str:
        target = LIBRARY.with_name(source.name + ".o")
        subprocess.run(["g++", *FLAGS, *DEVICES[NAME], "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, SOURCES))
    torch_library = [f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch"]
    subprocess.run(["g++", "-shared", *objects, *torch_library, "-o", str(LIBRARY)], check=True)


class Device:
    """Call it to change its settings: blocks at once, largest shared memory, and a seed for the order of threads or 0."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(LIBRARY))
        self.library.emulation_blocks.restype = self.library.emulation_copied.restype = ctypes.c_int64

    def __call__(self, processors: int = 3, shared: int = 227 << 10, order: int = 0) -> None:
        self.library.emulation_set(processors, shared, ctypes.c_uint(order))

    def lacks_code(self, reason: str) -> None:
        """Say this from now on to whoever asks why the device cannot run the kernels; nothing if it is empty."""
        self.library.emulation_lacks_code(reason.encode())

    def launches_nothing(self) -> None:
        """Kernels do not run from now on: what the host does is left."""
        self.library.emulation_launches_nothing()

    def bytes_copied(self, tensor: torch.Tensor, run: Callable[[], object]) -> int:
        """How many bytes of a tensor `run` copies to shared memory, each time that it does."""
        self.library.emulation_watch(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.nbytes))
        run()
        self.library.emulation_watched_bytes.restype = ctypes.c_int64
        return self.library.emulation_watched_bytes()

    @property
    def launches(self) -> int:
        return self.library.emulation_launches()

    @property
    def work(self) -> tuple[int, int]:
        """Blocks of all launches so far, and bytes that they have copied to shared memory."""
        return self.library.emulation_blocks(), self.library.emulation_copied()
