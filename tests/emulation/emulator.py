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
KERNELS = [*sorted((ROOT / "csrc").glob("*.cu")), ROOT / "csrc/hopper/slots.cu"]
SOURCES = [
    *KERNELS,
    ROOT / "csrc/register.cpp",
    HERE / "emulation.cpp",
    HERE / "emulated.cpp",
    HERE / "fused_linear.cpp",
]
TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-clobbered"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DLILORA_HOPPER", f"-I{HERE}"]
TORCH_INCLUDES = ["-isystem", str(TORCH / "include"), "-isystem", str(TORCH / "include/torch/csrc/api/include")]
# Kernels call a function before each access to memory; emulation.cpp has it.
SEEN = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"]
COPIES = ("late", "now", "random")  # as in emulation.h


def compile_source(source: Path, target: Path, csrc: Path = ROOT / "csrc") -> None:
    """One object, for the device that LILORA_EMULATION names; headers come from `csrc`."""
    flags = [*FLAGS, f"-I{csrc}", *TORCH_INCLUDES, *DEVICES[NAME], *(SEEN if source.suffix == ".cu" else [])]
    subprocess.run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)


def link(objects: list[Path], library: Path) -> None:
    torch_library = [f"-L{TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ldl"]
    subprocess.run(["g++", "-shared", *map(str, objects), *torch_library, "-o", str(library)], check=True)


def object_of(source: Path) -> Path:
    return LIBRARY.with_name(source.name + ".o")


def build() -> None:
    """Compile the kernels for the CPU, unless that is up to date."""
    if NAME not in DEVICES:
        raise pytest.UsageError(f"LILORA_EMULATION is {NAME!r}; name the device to emulate: {' or '.join(DEVICES)}")
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    inputs = [*SOURCES, *(ROOT / "csrc").rglob("*.h"), HERE / "emulation.h", Path(__file__)]
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda source: compile_source(source, object_of(source)), SOURCES))
    link([object_of(source) for source in SOURCES], LIBRARY)


class Device:
    """Call it to change its settings. `seed`: for the order of threads where no other is given."""

    def __init__(self, seed: int = 0, library: Path = LIBRARY) -> None:
        self.library = ctypes.CDLL(str(library))
        for count in ("blocks", "copied", "stored"):
            getattr(self.library, f"emulation_{count}").restype = ctypes.c_int64
        self.seed = seed

    def __call__(
        self, processors: int = 3, shared: int = 227 << 10, order: int | None = None, copies: str = "late"
    ) -> None:
        """Blocks at once, largest shared memory, a seed for the order of threads or 0, when asynchronous copies are done."""
        order = self.seed if order is None else order
        print(f"emulated device: {processors=} {shared=} {order=} {copies=}")  # pytest shows it where a test fails
        self.library.emulation_set(processors, shared, ctypes.c_uint(order), COPIES.index(copies))

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
    def work(self) -> tuple[int, int, int]:
        """Blocks of all launches so far, bytes that they have copied to shared memory, and those stored by eight or sixteen."""
        return self.library.emulation_blocks(), self.library.emulation_copied(), self.library.emulation_stored()
