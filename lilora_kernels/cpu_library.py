"""The compiled library of the CPU kernels: loading it, and why it is not there."""

import ctypes
import functools
import os
import struct
from pathlib import Path

import torch

from .cuda_library import one_line, truncated

PATH = Path(__file__).parent / "lib" / "liblilora_cpu.so"
NOT_BUILT = PATH.with_suffix(".txt")  # why, in one line
NO_BUILD = "this installation has no CPU build; pip install . makes one where it finds a C++ compiler"
INSTRUCTIONS = ("baseline", "avx2", "avx512")  # numbered from 1
INTERFACE = 5  # of csrc/cpu/decode.cpp
# Its struct Call, and Training of training.cpp: what is of one call alone, and what stays until parameters change.
OF_CALL, OF_PARAMETERS = struct.Struct("=10q"), struct.Struct("=22qd")
OF_TRAINING, OF_SIZES = struct.Struct("=19q"), struct.Struct("=7q2d")


class Kernels:
    """The library's functions. Raises OSError or AttributeError where it cannot be loaded, ValueError for LILORA_CPU_ISA."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        if library.lilora_cpu_interface() != INTERFACE:
            raise OSError(f"{path} is of another version; build it again")
        self.decode = library.lilora_cpu_decode
        self.decode.argtypes = (ctypes.c_char_p, ctypes.c_int64)
        self.train_forward, self.train_backward = library.lilora_cpu_train_forward, library.lilora_cpu_train_backward
        self.train_forward.argtypes = self.train_backward.argtypes = (ctypes.c_char_p,)
        self.instructions = min(library.lilora_cpu_instructions(), most_instructions())
        # Where products of many rows take half the time of torch's (bench/results/small-training/avx512.json).
        self.outruns = INSTRUCTIONS[self.instructions - 1] == "avx512" and bool(library.lilora_cpu_is_amd())
        self.has_bf16 = bool(library.lilora_cpu_has_bf16())
        self.parallel_for = parallel_for()


def most_instructions() -> int:
    name = os.environ.get("LILORA_CPU_ISA") or INSTRUCTIONS[-1]
    if name not in INSTRUCTIONS:
        raise ValueError(f"LILORA_CPU_ISA is {name!r}; it must be one of {list(INSTRUCTIONS)}")
    return INSTRUCTIONS.index(name) + 1


def parallel_for() -> int:
    """The address of torch's own, so that there is one pool of threads; 0 where this torch does not export it."""
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        function = getattr(ctypes.CDLL(str(path)), "torch_parallel_for", None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


@functools.cache
def load() -> Kernels | str:
    """The library, loaded once per process, or in a few words why it is missing."""
    try:
        if truncated(PATH):
            raise OSError(f"{PATH} is truncated")
        return Kernels(PATH)
    except FileNotFoundError:
        return NOT_BUILT.read_text().strip() if NOT_BUILT.exists() else NO_BUILD
    except (OSError, AttributeError) as error:
        return one_line(error)
