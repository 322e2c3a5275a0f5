"""The Triton kernels that `bench/tune.py` tunes: the problems each is tried on, and launches with any configuration."""

import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from unittest.mock import patch

import torch
from torch import Tensor

from lilora_kernels.backends import ONE_LAUNCH_ROWS
from lilora_kernels.ops import triton_runtime
from lilora_kernels.ops.delta import reference, triton_configs
from lilora_kernels.ops.philox import keep_mask, keep_scale
from lilora_kernels.ops.schema import AdapterArgs

from .compare import error, poisoned
from .problems import ATTENTION, DOWN, GATE_UP, GRADIENTS, SCALING, TINY, Operands, Problem
from .timing import Candidate, Machine, measure, nbytes

KERNELS = list(triton_configs.HEURISTICS)
AT_ONCE = "delta_forward", "delta_backward"
FORWARD = "shrink", "expand", "delta_forward"
OF_A_CHUNK = "from_dy", "from_x", "add_partials"  # jobs that CHUNK, a constant of the first, takes effect on
ROWS = [*triton_configs.ROWS, triton_configs.MANY]
SHORT_ROWS, SHORT_CALLS = 512, 8  # calls on so few rows are timed together
COMPILERS = 8  # processes
COMPILED_ROWS = 16

Sizes = dict[str, int]
"""A configuration, for 2-byte elements and ranks up to 128."""


@dataclass(frozen=True)
class Entry:
    """The configuration of one kernel for calls of fewest..rows rows."""

    kernel: str
    rows: int

    @property
    def buckets(self) -> list[int]:
        """Where it goes. A forward has one configuration up to ONE_LAUNCH_ROWS: a row's bits depend on no other row there."""
        if self.kernel not in FORWARD or self.rows > ONE_LAUNCH_ROWS:
            return [self.rows]
        return [rows for rows in ROWS if rows <= ONE_LAUNCH_ROWS] if self.rows == ONE_LAUNCH_ROWS else []

    @property
    def fewest(self) -> int:
        return max((rows + 1 for rows in ROWS if rows < self.buckets[0]), default=1)

    @property
    def middle(self) -> int:
        """The geometric mean of the fewest and the most, to a multiple of 16."""
        return -(-math.isqrt(self.fewest * self.rows) // 16) * 16

    @property
    def one_launch(self) -> bool:
        return self.kernel in AT_ONCE

    @property
    def job(self) -> str:
        """The method of Forward or Backward that launches the kernel."""
        return "at_once" if self.one_launch else self.kernel

    def timed(self, names: Iterable[str]) -> tuple[str, ...]:
        """The jobs whose time decides about these constants."""
        return OF_A_CHUNK if self.kernel == "from_dy" and "CHUNK" in names else (self.job,)

    def present(self, device: torch.device) -> Sizes:
        programs = {"PROGRAMS": 1} if self.one_launch else {}
        return programs | triton_configs.chosen(triton_runtime.device_names(device), self.kernel, self.rows)

    def __str__(self) -> str:
        return f"{self.kernel} {self.rows}"


def entries(kernels: list[str], rows: list[int]) -> list[Entry]:
    """The most important first: training from the most rows down, in turn with decoding from the fewest up."""

    def rank(entry: Entry) -> tuple[int, bool]:
        at = ROWS.index(entry.buckets[0]) if entry.one_launch else len(ROWS) - 1 - ROWS.index(entry.rows)
        return at, entry.one_launch

    found = [Entry(kernel, most) for kernel in KERNELS if kernel in kernels for most in ROWS]
    return sorted((entry for entry in found if set(entry.buckets) & set(rows)), key=rank)


def problems(entry: Entry, tiny: bool) -> tuple[Problem, list[Problem]]:
    """The problem to search on, and the held-out ones: other shapes, at the ends of the entry's range of rows."""
    if tiny:
        problem = partial(Problem, rank=16, sub_rank=8, dtype=torch.float32)
        return problem(20, *TINY, 2, 0.05), [problem(9, *TINY[::-1]), problem(24, *TINY[::-1], 2, 0.05)]

    def problem(rows: int, shape: tuple[int, int], tasks: int) -> Problem:
        tasks = min(tasks, rows)
        return Problem(rows, *shape, tasks, 0.05 if tasks > 1 else 0.0)

    few, many = entry.fewest, entry.rows
    held_out = [(few, DOWN, 8), (many, DOWN, 1), (few, ATTENTION, 1), (many, ATTENTION, 8)]
    return problem(entry.middle, GATE_UP, 8), [problem(*chosen) for chosen in held_out]


@contextmanager
def using(entry: Entry, sizes: Sizes) -> Iterator[None]:
    """Calls of the backend made here launch the entry's kernel with these sizes."""
    own = triton_configs.configuration

    def configuration(kernel: str, x: Tensor, adapter: AdapterArgs, pair: bool = False) -> triton_configs.Configuration:
        if kernel != entry.kernel:
            return own(kernel, x, adapter, pair)
        names = triton_runtime.device_names(x.device)
        return triton_configs.Configuration(
            triton_configs.shrink_tiles(sizes, names, *triton_configs.widths(x, adapter))
        )

    with patch.object(triton_configs, "configuration", configuration):
        yield


def prepared(entry: Entry, s: Operands):
    """The Forward or Backward of these operands, ready for its jobs."""
    from lilora_kernels.ops.delta.triton_jobs import Backward, Forward

    if entry.kernel in FORWARD:
        return Forward(s.x.detach(), None, s.adapter(), entry.one_launch)
    return Backward(s.dy, s.x.detach(), s.h, s.adapter(), frozenset(GRADIENTS), entry.one_launch)


def jobs_of(entry: Entry, work) -> list[Callable]:
    """All jobs fit one launch or fail: `run_jobs` would run them apart, which says nothing of it."""
    return [type(work).at_once] if entry.one_launch else work.jobs


class Compiler:
    """Compiles in other processes, into Triton's cache on disk, where this one finds it. The interpreter compiles nothing."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def failures(self, jobs: list[tuple], seconds: float) -> list[str | None]:
        """What each job (function, *arguments) returns: why it fails, or None."""
        if not self.machine.on_gpu:
            return [None] * len(jobs)
        if self.pool is None:
            processes = min(COMPILERS, os.cpu_count() or 1)
            self.pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
        until = time.monotonic() + seconds

        def failure(job: Future) -> str | None:
            try:
                return job.result(max(until - time.monotonic(), 0))
            except TimeoutError:
                job.cancel()
                return "TimeoutError: not compiled in the time that there was"

        try:
            pending = [self.pool.submit(*job) for job in jobs]
            return [failure(job) for job in pending]
        except BrokenProcessPool as broken:  # a compiler that aborts takes its process along
            self.pool = None
            return [described(broken)] * len(jobs)


def launch_once(machine: Machine, entry: Entry, problem: Problem, sizes: Sizes) -> str | None:
    """Compile the kernel; why it fails, or None. Few rows do: kernels are not specialized on their number."""
    try:
        with using(entry, sizes):
            work = prepared(entry, few_rows(problem, machine.device))
            getattr(work, entry.job)()
        machine.synchronize()
    except Exception as failure:
        return described(failure)
    return None


def variant_once(arch: int, shared: int, entry: Entry, sizes: Sizes, variant) -> str | None:
    """Compile a `Variant` of the kernel for sm_<arch>; why it does not fit `shared` bytes of shared memory, or None."""
    from tools.resources import program

    try:
        needed = program(entry.kernel, arch, entry.rows, variant, sizes).compiled().shared
    except Exception as failure:
        return described(failure)
    if needed > shared:
        return f"OutOfResources: {entry.kernel} needs {needed} bytes of shared memory, of {shared}, as {variant}"
    return None


@lru_cache(maxsize=1)
def few_rows(problem: Problem, device: torch.device) -> Operands:
    return Operands(replace(problem, rows=COMPILED_ROWS), device, 0)


def described(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:300]


def variants(large: bool) -> list:
    """Of a kernel: each needs more than what is timed. What serves a pair of adapters has sizes of its own.

    large: blocks have shared memory for the largest ranks, which the backend refuses elsewhere.
    """
    from tools.resources import Variant

    masters, ranks = {"masters": torch.float32}, {"rank": 256, "sub_rank": 128 if large else 64}
    full = {"sub_rank": 128}
    found = [masters, {"dtype": torch.float32}, {"gate": True}, full, masters | full, ranks, masters | ranks]
    return [Variant(**each) for each in found]


class Launches:
    """Runs one entry's kernel on one problem, with any sizes."""

    def __init__(self, compiler: Compiler, entry: Entry, problem: Problem) -> None:
        self.compiler, self.machine, self.entry, self.problem = compiler, compiler.machine, entry, problem
        first = Operands(problem, self.machine.device, 0)
        self.exact = solve(first, entry.kernel in FORWARD)
        # The base weight is not read here: what is has to be cold by itself.
        copies = self.machine.copies(nbytes((first.x, first.dy, first.h, *first.factors())))
        self.sets = [first, *(Operands(problem, self.machine.device, i) for i in range(1, copies))]

    def compile(self, configurations: list[Sizes], seconds: float) -> list[str | None]:
        """Why each of them cannot be launched, or None."""
        jobs = [(launch_once, self.machine, self.entry, self.problem, each) for each in configurations]
        return self.compiler.failures(jobs, seconds)

    def unfit_variant(self, found: Sizes, seconds: float) -> str | None:
        """Why a variant of the kernel that is not timed here could not be launched with what was found, or None."""
        if not self.machine.on_gpu:
            return None
        major, minor = triton_runtime.capability(self.machine.device)
        shared = torch.cuda.get_device_properties(self.machine.device).shared_memory_per_block_optin
        where = 10 * major + minor, shared, self.entry, found
        jobs = [(variant_once, *where, variant) for variant in variants(shared > 4 * 256 * 128)]
        return next(filter(None, self.compiler.failures(jobs, seconds)), None)

    def check(self, sizes: Sizes) -> None:
        """Raises if the kernel does not run or results are wrong."""
        with poisoned(self.machine.device), using(self.entry, sizes):
            work = prepared(self.entry, self.sets[0])
            for job in jobs_of(self.entry, work):
                job(work)
        got = {"y": work.y, "h": work.h} if self.entry.kernel in FORWARD else work.grads
        for name, want in self.exact.items():
            error(f"{name} of {self.entry}", got[name], want)

    def times(
        self, configurations: dict[str, Sizes], timed: tuple[str, ...], rounds: int, seconds: float
    ) -> dict[str, list[float]]:
        """Microseconds of each configuration in alternation, of jobs that follow each other."""
        calls = SHORT_CALLS if self.machine.on_gpu and self.problem.rows <= SHORT_ROWS else 1
        sets = itertools.cycle(self.sets)  # whoever runs next takes those that nobody has read for longest

        def candidate(sizes: Sizes) -> Candidate:
            def run(_: int, mark: Callable[[], None]) -> None:
                with using(self.entry, sizes):
                    works = [prepared(self.entry, next(sets)) for _ in range(calls)]
                    jobs = jobs_of(self.entry, works[0])
                    first = [job.__name__ for job in jobs].index(timed[0])
                    for part in (jobs[:first], jobs[first : first + len(timed)]):
                        for work in works:
                            for job in part:
                                job(work)
                        mark()

            return run

        runs = {name: candidate(sizes) for name, sizes in configurations.items()}
        times = measure(self.machine, runs, ["before", "timed"], rounds, calls, seconds)
        return {name: found["timed"] for name, found in times.items()}


def solve(s: Operands, forward: bool) -> dict[str, Tensor]:
    """The results of a forward or of a backward of these operands, in fp64. Sets their h, and as dy their y, as the gate does."""
    p = s.problem.p
    x, *factors = (t.detach().double().requires_grad_(not forward) for t in s.gradients())
    keep = keep_mask(s.seed, *x.shape, p) if p else None
    y = reference.delta(x, *factors, task=s.task, keep=keep, keep_scale=keep_scale(p), scaling=SCALING)
    dropped = x.detach() if keep is None else x.detach() * keep * keep_scale(p)
    h = dropped @ factors[0].detach().T
    s.dy, s.h = y.detach().to(s.problem.dtype), h.to(s.problem.dtype)
    if forward:
        return {"y": y, "h": h}
    return dict(zip(GRADIENTS, torch.autograd.grad(y, [x, *factors], s.dy.double()), strict=True))
