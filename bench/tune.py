"""Search launch configurations of the Triton kernels, and write those that prove better.

python -m bench.tune --out lilora_kernels/configs             on a GPU
TRITON_INTERPRET=1 python -m bench.tune --out . --tiny        every step on tiny shapes, without one

From the configuration in use, each step tries all that differ from it in one constant by one place in VALUES, and takes
the fastest. A kernel is tuned for the time of its launch, in a forward or backward whose other kernels keep their
configuration. What was found is compared with the configuration in use on held-out problems, in fresh rounds, and written
only if it is better on them and the kernel's other variants (fp32 parameters, larger ranks, a gate) fit the GPU too.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from lilora_kernels.backends import ONE_LAUNCH_ROWS
from lilora_kernels.ops import triton_runtime
from lilora_kernels.ops.delta import reference, triton_configs
from lilora_kernels.ops.philox import keep_mask, keep_scale
from lilora_kernels.ops.schema import AdapterArgs

from .compare import error, poisoned
from .interpreter import patch_once_a_launch
from .problems import ATTENTION, DOWN, GATE_UP, GRADIENTS, SCALING, TINY, Operands, Problem
from .timing import Candidate, Machine, measure, nbytes, ratio

KERNELS = list(triton_configs.HEURISTICS)
AT_ONCE = "delta_forward", "delta_backward"
FORWARD = "shrink", "expand", "delta_forward"
OF_A_CHUNK = "from_dy", "from_x", "add_partials"  # jobs that CHUNK, a constant of the first, takes effect on
ROWS = [*triton_configs.ROWS, triton_configs.MANY]
VALUES = {
    "BLOCK_M": (16, 32, 64, 128),
    "BLOCK_K": (32, 64, 128),
    "BLOCK_N": (32, 64, 128),
    "SPLIT_K": (1, 2, 4, 8, 16, 32),
    "SPLIT_N": (1, 2, 4, 8, 16, 32),
    "TILES_N": (1, 2, 4, 8, 16),
    "CHUNK": (256, 512, 1024, 2048, 4096),
    "PROGRAMS": (1, 2, 3, 4),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3, 4, 5),
}
STEP = 0.99  # the share of the time that a step has to stay below
BETTER = 0.97  # what the geometric mean of the held-out ratios has to stay below
SLOWER = 1.02  # what no held-out ratio's 20th percentile may exceed
SEARCH_SHARE = 0.5  # of an entry's time; the rest is for validation
ROUNDS = 15
SHORT_ROWS, SHORT_CALLS = 512, 8  # calls on so few rows are timed together
COMPILERS = 8  # processes
COMPILED_ROWS = 16

Sizes = dict[str, int]
"""A configuration, for 2-byte elements and ranks up to 128."""
Table = dict[str, dict[str, Sizes]]
"""{kernel: {rows: sizes}}, as configs/*.json."""


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


# --- launches ---------------------------------------------------------------------------------------------------------


@contextmanager
def using(entry: Entry, sizes: Sizes) -> Iterator[None]:
    """Calls of the backend made here launch the entry's kernel with these sizes."""
    own = triton_configs.configuration

    def configuration(kernel: str, x: Tensor, adapter: AdapterArgs, pair: bool = False) -> triton_configs.Configuration:
        if kernel != entry.kernel:
            return own(kernel, x, adapter, pair)
        return triton_configs.Configuration(triton_configs.shrink_tiles(sizes, *triton_configs.widths(x, adapter)))

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
    from tools.resources import compile_kernel

    try:
        needed = compile_kernel(entry.kernel, arch, entry.rows, variant, sizes).shared
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
    found = [masters, {"dtype": torch.float32}, {"gate": True}, ranks, masters | ranks]
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


# --- search -----------------------------------------------------------------------------------------------------------


def groups(sizes: Sizes) -> list[list[str]]:
    """Constants that are tuned together, those that other kernels depend on first."""
    own = [name for name in sizes if name != "CHUNK"]
    return [["CHUNK"], own] if "CHUNK" in sizes else [own]


def neighbours(sizes: Sizes, names: list[str]) -> dict[str, Sizes]:
    """All sizes one place away in one of these constants, by a name that says the difference."""
    found = {}
    for name in names:
        smaller = [value for value in VALUES[name] if value < sizes[name]]
        larger = [value for value in VALUES[name] if value > sizes[name]]
        for value in smaller[-1:] + larger[:1]:
            found[f"{name} {sizes[name]} -> {value}"] = sizes | {name: value}
    return found


class Search:
    """Goes from one configuration to faster ones, while there are some and `left()`, in seconds, is above 0."""

    def __init__(self, running: Launches, entry: Entry, rounds: int, left: Callable[[], float]) -> None:
        self.running, self.entry, self.rounds, self.left = running, entry, rounds, left
        self.tried: dict[str, str | None] = {}  # configuration -> why it was dropped
        self.dropped: Counter[str] = Counter()

    def run(self, present: Sizes) -> Sizes:
        best, before = present, None
        while best != before and self.left() > 0:
            before = best
            for names in groups(present):
                best = self.climb(present, best, names)
        return best

    def climb(self, present: Sizes, best: Sizes, names: list[str]) -> Sizes:
        timed = self.entry.timed(names)
        while self.left() > 0:
            steps = self.usable(neighbours(best, names))
            if not steps:
                break
            times = self.running.times({"present": present, "best": best, **steps}, timed, self.rounds, self.left())
            ratios = {name: ratio(found, times["present"])["median"] for name, found in times.items()}
            step = min(steps, key=ratios.__getitem__)
            if ratios[step] >= STEP * ratios["best"]:
                break
            best = steps[step]
            print(f"{self.entry}: {step}: {ratios[step]:.3f} of the time", flush=True)
        return best

    def usable(self, configurations: dict[str, Sizes]) -> dict[str, Sizes]:
        """Those that run with right results, as far as there is time to know."""
        keys = {name: json.dumps(sizes, sort_keys=True) for name, sizes in configurations.items()}
        new = {name: sizes for name, sizes in configurations.items() if keys[name] not in self.tried}
        for name, failure in zip(new, self.running.compile(list(new.values()), self.left()), strict=True):
            if self.left() <= 0:
                break
            try:
                if failure is None:
                    self.running.check(new[name])
            except Exception as raised:
                failure = described(raised)
            self.tried[keys[name]] = failure
            if failure is not None:
                self.dropped[failure.partition(":")[0]] += 1
                print(f"{self.entry}: {name}: dropped, {failure}", flush=True)
        return {name: found for name, found in configurations.items() if self.tried.get(keys[name], "untried") is None}


# --- validation -------------------------------------------------------------------------------------------------------


def geometric_mean(ratios: list[dict[str, float]]) -> float:
    return statistics.geometric_mean([spread["median"] for spread in ratios])


def rejection_reason(ratios: list[dict[str, float]]) -> str | None:
    """Why a configuration with these ratios to the one in use, a spread for each held-out problem, is not better."""
    slowest = max(spread["p20"] for spread in ratios)
    if slowest > SLOWER:
        return f"a held-out problem takes {slowest:.3f} of the time, more than {SLOWER}"
    mean = geometric_mean(ratios)
    return None if mean < BETTER else f"held-out problems take {mean:.3f} of the time, not less than {BETTER}"


@dataclass(frozen=True)
class Tuner:
    """Decides about entries. `running` runs an entry's kernel on a problem; `now()` is a time in seconds."""

    machine: Machine
    running: Callable[[Entry, Problem], Launches]
    now: Callable[[], float]

    def decide(self, entry: Entry, present: Sizes, until: float) -> dict:
        """What was found for one entry by then, and why it is or is not better."""
        start = self.now()
        print(f"{entry}: {max(until - start, 0):.0f} s", flush=True)
        decision = {
            "kernel": entry.kernel, "rows": entry.rows, "present": present, "found": None, "tried": 0, "dropped": {},
            "searched": None, "held_out": [], "improved": False,
        }  # fmt: skip
        try:
            decision["reason"] = self.examine(entry, present, until, decision)
        except Exception as failure:  # one entry takes nothing from the others
            decision["reason"] = described(failure)
        return {**decision, "seconds": round(self.now() - start, 1)}

    def examine(self, entry: Entry, present: Sizes, until: float, decision: dict) -> str:
        """Search, then validation; fills in the decision and returns the reason for it."""
        searching_until = self.now() + SEARCH_SHARE * (until - self.now())
        if self.now() >= searching_until:
            return "no time left"
        found = self.search(entry, present, searching_until, decision)
        if found == present:
            return "nothing faster found" + (" in its time" if self.now() >= searching_until else "")
        decision["found"] = found
        return self.validate(entry, present, found, until, decision)

    def search(self, entry: Entry, present: Sizes, until: float, decision: dict) -> Sizes:
        running = self.running(entry, problems(entry, self.machine.tiny)[0])
        running.compile([present], until - self.now())
        running.check(present)
        search = Search(running, entry, self.machine.rounds, lambda: until - self.now())
        found = search.run(present)
        decision |= {"tried": len(search.tried), "dropped": dict(search.dropped)}
        return found

    def validate(self, entry: Entry, present: Sizes, found: Sizes, until: float, decision: dict) -> str:
        """Puts the ratios of `found` into the decision, and whether it is better; returns why."""
        timed = entry.timed(name for name, size in found.items() if size != present[name])

        def compare(running: Launches, problem: Problem) -> dict:
            running.compile([present, found], until - self.now())
            running.check(found)
            times = running.times(
                {"present": present, "found": found}, timed, 2 * self.machine.rounds, until - self.now()
            )
            return {**problem.describe(), "ratio": ratio(times["found"], times["present"])}

        searched, held_out = problems(entry, self.machine.tiny)
        for problem in (searched, *held_out):
            if self.now() >= until:
                return "no time left to validate what was found"
            running = self.running(entry, problem)
            result = compare(running, problem)
            print(f"{entry}: {'searched' if problem is searched else 'held out'}: {json.dumps(result)}", flush=True)
            if problem is searched:
                decision["searched"] = result
            else:
                decision["held_out"].append(result)
        ratios = [result["ratio"] for result in decision["held_out"]]
        why_not = rejection_reason(ratios) or running.unfit_variant(found, until - self.now())
        decision["improved"] = why_not is None
        return why_not or f"held-out problems take {geometric_mean(ratios):.3f} of the time"


# --- the table --------------------------------------------------------------------------------------------------------


def tune(
    machine: Machine,
    kernels: list[str],
    rows: list[int],
    minutes: float,
    write: Callable[[dict], None] = lambda decision: None,
    running: Callable[[Compiler, Entry, Problem], Launches] = Launches,
    now: Callable[[], float] = time.monotonic,
) -> tuple[Table, list[dict]]:
    """The configurations that are better than those in use, and a decision for every entry.

    `write` gets each decision as it is made. Entries that there is no time for keep their configuration. `running` and
    `now` are for tests.
    """
    end = now() + 60 * minutes
    chosen = entries(kernels, rows)
    better: Table = {}
    decisions = []
    with Compiler(machine) as compiler:
        tuner = Tuner(machine, partial(running, compiler), now)
        for at, entry in enumerate(chosen):
            # A third of what is left: the first entries are worth most, and what one does not need goes to the next.
            until = now() + (end - now()) / min(3, len(chosen) - at)
            decision = tuner.decide(entry, entry.present(machine.device), until)
            if decision["improved"]:
                found = better.setdefault(entry.kernel, {})
                found |= {str(rows): decision["found"] for rows in entry.buckets}
            print(f"{entry}: {'IMPROVED' if decision['improved'] else 'kept'}, {decision['reason']}", flush=True)
            write(decision)
            decisions.append(decision)
            if machine.on_gpu:
                torch.cuda.empty_cache()
    return better, decisions


def in_file(path: Path, device: torch.device) -> Table:
    """What the file has, or where there is none, what is in use, which it will stand in for; ValueError with a sentence."""
    if not path.exists():
        return triton_configs.tuned(triton_runtime.device_names(device))
    try:
        table = json.loads(path.read_text())
        if all(rows.isdigit() and isinstance(each, dict) for known in table.values() for rows, each in known.items()):
            return table
    except (ValueError, AttributeError, OSError):
        pass
    raise ValueError(f"{path} is not {{kernel: {{rows: sizes}}}} in JSON; move it away or give another file")


def save(better: Table, path: Path, device: torch.device) -> None:
    """Put what is better into the file, which is written whole or not at all, a line for each bucket of rows."""
    table = in_file(path, device)
    table = table | {kernel: table.get(kernel, {}) | buckets for kernel, buckets in better.items()}
    kernels = []
    for kernel, buckets in table.items():
        lines = [f'    "{rows}": {json.dumps(buckets[rows])}' for rows in sorted(buckets, key=int)]
        kernels.append(f'  "{kernel}": {{\n' + ",\n".join(lines) + "\n  }")
    part = path.with_name(path.name + ".part")
    part.write_text("{\n" + ",\n".join(kernels) + "\n}\n")
    part.replace(path)


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="a .json file, or a folder for one named for the device"
    )
    parser.add_argument("--kernels", help=f"of {', '.join(KERNELS)}, separated by commas; all by default")
    parser.add_argument("--rows", help=f"the most that a configuration is for: of {ROWS}; all by default")
    parser.add_argument("--minutes", type=float, default=4.0, help="for everything")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU, with TRITON_INTERPRET=1")
    options = parser.parse_args(arguments)
    machine = Machine.here(ROUNDS, options.tiny)
    if options.tiny and not triton_runtime.INTERPRETED:
        parser.error("--tiny runs in Triton's interpreter; set TRITON_INTERPRET=1 in the environment")
    if options.tiny:
        patch_once_a_launch()
    dtype = torch.float32 if options.tiny else torch.bfloat16
    why_not = triton_runtime.unsupported_reason(torch.empty(0, dtype=dtype, device=machine.device), 128, 64)
    if why_not is not None:
        parser.error(
            f"the Triton kernels cannot be timed here: {why_not}; for a run on tiny shapes without a GPU give --tiny"
        )

    def chosen(option: str, given: str | None, known: list[str]) -> list[str]:
        found = known if given is None else given.split(",")
        for name in found:
            if name not in known:
                parser.error(f"{option} has {name!r}; there are {', '.join(known)}")
        return found

    kernels = chosen("--kernels", options.kernels, KERNELS)
    rows = [int(each) for each in chosen("--rows", options.rows, [str(each) for each in ROWS])]
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes is {options.minutes}; give a finite number above 0")
    device_name = next(iter(triton_runtime.device_names(machine.device)), "cpu")
    path = options.out / f"{device_name}.json" if options.out.is_dir() else options.out
    if path.suffix != ".json" or not path.parent.is_dir():
        parser.error(f"--out is {options.out}; give a folder that exists, or a .json file in one")
    try:
        in_file(path, machine.device)
    except ValueError as unreadable:
        parser.error(str(unreadable))

    torch.manual_seed(0)
    better, decisions = tune(machine, kernels, rows, options.minutes)
    if not better:
        print(f"no configuration is better than the one in use; {path} is not written")
        return 0
    save(better, path, machine.device)
    improved = sum(decision["improved"] for decision in decisions)
    print(f"{path} is written with {improved} new configurations of {len(decisions)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
