"""Launches Triton kernels: one like an earlier one goes straight to what Triton compiled for that.

JITFunction.run binds and specialises all arguments anew and costs ten times what the launch itself does. It makes the first
launch of each kind, so that compiling and Triton's caches stay its own.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from math import gcd
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

from . import triton_runtime as runtime

# Versions whose CompiledKernel.run takes what is passed to it here. Others launch by JITFunction.run alone.
BOUND = runtime.release(triton.__version__) in ((3, 6), (3, 7))
NOTHING = nullcontext()


class Launch(dict):
    """A kernel's launch but for its grid and arguments: the constants by name, and what was compiled. Read only, but for
    programs: of a cooperative launch, for each processor; 0 for any other.
    """

    def __init__(self, kernel, constants: dict[str, object], programs: int = 0) -> None:
        super().__init__(constants)
        self.kernel = kernel
        self.programs = programs
        self.options = {} if runtime.INTERPRETED else {"launch_cooperative_grid": programs > 0}
        self.in_order = [self[name] for name in kernel.arg_names if name in self]
        self.bound: dict[tuple, tuple] = {}
        self.integers: list[tuple[int, bool]] | None = None

    def specialisation(self, tensors: list, pointers: list[int], numbers: tuple) -> tuple:
        """Different wherever Triton would compile differently: None, types, multiples of 16, integers that are 1 or large."""
        if self.integers is None:
            names = [name for name in self.kernel.arg_names if name not in self][-len(numbers) :] if numbers else []
            unspecialized = {parameter.name for parameter in self.kernel.params if parameter.do_not_specialize}
            self.integers = [(i, names[i] in unspecialized) for i, n in enumerate(numbers) if isinstance(n, int)]
        return (
            tuple([None if t is None else t.dtype for t in tensors]),
            gcd(16, *pointers) < 16 and tuple([pointer & 15 for pointer in pointers]),
            tuple(
                [n >> 31 if plain else n == 1 or (n & 15, n >> 31) for i, plain in self.integers for n in [numbers[i]]]
            ),
        )


def current(device: torch.device) -> AbstractContextManager:
    """Makes it the current one; a tensor's device on a GPU has an index."""
    here = device.index is None or device.index == torch.cuda.current_device()
    return NOTHING if here else torch.cuda.device(device)


class Ready(NamedTuple):
    """A launch but for its pointers. groups: how many of them each group of the kernel's arguments has; numbers: with the
    constants."""

    kernel: object
    compiled: tuple
    grid: tuple[int, int, int]
    groups: tuple[int, ...]
    numbers: tuple

    def __call__(self, device: int, pointers: Sequence[int]) -> None:
        """On the current device, of this index."""
        run, function, metadata = self.compiled
        nested, end = [], 0
        for size in self.groups:
            nested.append(tuple(pointers[end : end + size]))
            end += size
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(*self.grid, stream, function, metadata, None, None, None, *nested, *pointers[end:], *self.numbers)


def launch(
    made: Launch, grid: tuple[int, int, int], tensors: tuple[Tensor | None, ...], numbers: tuple, groups: tuple = ()
) -> tuple[Ready, list[Tensor | None]] | None:
    """Launch on the current device. The kernel's arguments in its order: groups of tensors (named tuples), tensors, or None
    in the place of one, numbers. What was launched with which tensors; None where Triton had to see it."""
    if runtime.INTERPRETED or not BOUND or observed(made.kernel):
        made.kernel[grid](*groups, *tensors, *numbers, **made, **made.options)
        return None
    flat = [*chain.from_iterable(groups), *tensors]
    pointers = [0 if t is None else t.data_ptr() for t in flat]
    device = next(t for t in flat if t is not None).get_device()
    key = device, made.specialisation(flat, pointers, numbers)
    if (bound := made.bound.get(key)) is None:
        compiled = made.kernel[grid](*groups, *tensors, *numbers, **made, **made.options)
        if isinstance(compiled, CompiledKernel):
            made.bound[key] = compiled.run, compiled.function, compiled.packed_metadata
        return None
    ready = Ready(made.kernel, bound, grid, tuple(map(len, groups)), (*numbers, *made.in_order))
    ready(device, pointers)
    return ready, flat


def observed(kernel) -> bool:
    """Whether a profiler or debugger has to see the launch, or may change what is compiled for it."""
    watch = knobs.runtime
    enter, leave = watch.launch_enter_hook, watch.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or kernel.pre_run_hooks
        or watch.debug
        or watch.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )
