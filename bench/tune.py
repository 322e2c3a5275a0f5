"""Search launch configurations of the Triton kernels, and write a table of those that prove better.

python -m bench.tune --out lilora_kernels/configs             on a GPU
TRITON_INTERPRET=1 python -m bench.tune --out . --tiny        every step on tiny shapes, without one

From the configuration in use, each step tries all that differ from it in one constant by one place in VALUES, and takes
the fastest. Phases with launches of their own are tuned one by one, each for its own time. What was found is compared
with the configuration in use on held-out problems, in fresh rounds, and written only if it is better on them and the
kernel's other variants (fp32 parameters, larger ranks, a gate) fit the GPU with it too.
"""

import argparse
import copy
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from lilora_kernels.backends import ONE_LAUNCH_ROWS
from lilora_kernels.ops import triton_runtime
from lilora_kernels.ops.delta import reference
from lilora_kernels.ops.philox import keep_mask, keep_scale
from lilora_kernels.ops.schema import AdapterArgs

from .compare import error, poisoned
from .interpreter import patch_once_a_launch
from .problems import ATTENTION, DOWN, GATE_UP, GRADIENTS, SCALING, TINY, Operands, Problem
from .timing import Candidate, Machine, measure, nbytes, ratio

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
SHARED = {"forward": ("SPLIT_K",), "backward": ("SPLIT_N", "CHUNK")}  # that all phases have to agree on
STEP = 0.99  # the share of the time that a step has to stay below
BETTER = 0.97  # what the geometric mean of the held-out ratios has to stay below
SLOWER = 1.02  # what no held-out ratio's 20th percentile may exceed
SEARCH_SHARE = 0.5  # of an entry's time; the rest is for validation
ROUNDS = 15
SHORT_ROWS, SHORT_CALLS = 512, 8  # calls on so few rows are timed together
COMPILERS = 8  # processes
COMPILED_ROWS = 16

Configuration = dict
"""A bucket of configs/*.json without its rows."""


@dataclass(frozen=True)
class Entry:
    """One configuration of the table: its place there, and the fewest and most rows it serves."""

    plan: str
    kernel: str
    rows: int
    fewest: int
    most: int

    @property
    def one_launch(self) -> bool:
        return self.plan == "one_launch"

    @property
    def phases(self) -> range:
        return range(3 if self.kernel == "forward" else 4)

    def __str__(self) -> str:
        return f"{self.plan} {self.kernel} {self.rows}"


def entries(table: dict, plans: list[str], kernels: list[str], rows: list[int]) -> list[Entry]:
    """The chosen entries, most important first: training from the most rows down, in turn with decoding from the fewest up."""
    ranked = []
    for plan, kernel in itertools.product(plans, kernels):
        one_launch = plan == "one_launch"
        buckets = [bucket["rows"] for bucket in table[plan][kernel]]
        edges = [math.isqrt(low * high) for low, high in itertools.pairwise(buckets)]
        fewest = [1 if one_launch else ONE_LAUNCH_ROWS + 1, *(edge + 1 for edge in edges)]
        most = [*edges, 2 * buckets[-1]]
        found = [Entry(plan, kernel, *each) for each in zip(buckets, fewest, most, strict=True)]
        for rank, entry in enumerate(found if one_launch else reversed(found)):
            ranked.append(((rank, one_launch, kernel != "forward"), entry))
    return [entry for _, entry in sorted(ranked, key=lambda pair: pair[0]) if entry.rows in rows]


def problems(entry: Entry, tiny: bool) -> tuple[Problem, list[Problem]]:
    """The problem to search on, and the held-out ones: other shapes, at the ends of the entry's range of rows."""
    if tiny:
        problem = partial(Problem, rank=16, sub_rank=8, dtype=torch.float32)
        return problem(20, *TINY, 2, 0.05), [problem(9, *TINY[::-1]), problem(24, *TINY[::-1], 2, 0.05)]

    def problem(rows: int, shape: tuple[int, int], tasks: int) -> Problem:
        tasks = min(tasks, rows)
        return Problem(rows, *shape, tasks, 0.05 if tasks > 1 else 0.0)

    few, many = entry.fewest, entry.most
    held_out = [(few, DOWN, 8), (many, DOWN, 1), (few, ATTENTION, 1), (many, ATTENTION, 8)]
    return problem(entry.rows, GATE_UP, 8), [problem(*chosen) for chosen in held_out]


# --- launches ---------------------------------------------------------------------------------------------------------


@contextmanager
def using(configuration: Configuration) -> Iterator[None]:
    """Calls of the backend made here take this configuration."""
    own = triton_runtime.config

    def config(kernel: str, one_launch: bool, x: Tensor, adapter: AdapterArgs) -> triton_runtime.Configuration:
        element = x.element_size()  # that of the parameters too
        sizes = triton_runtime.fitted(configuration, element, element, triton_runtime.padded(adapter.a.shape[0]))
        return triton_runtime.Configuration(sizes)

    triton_runtime.config = config
    try:
        yield
    finally:
        triton_runtime.config = own


def prepared(entry: Entry, configuration: Configuration, s: Operands):
    """The Forward or Backward of these operands, ready to be launched."""
    from lilora_kernels.ops.delta.triton_phases import Backward, Forward

    with using(configuration):
        config = triton_runtime.config(entry.kernel, entry.one_launch, s.dy, s.adapter())
    if entry.kernel == "forward":
        return Forward(s.x.detach(), None, s.adapter(), config)
    return Backward(s.dy, s.x.detach(), s.h, s.adapter(), frozenset(GRADIENTS), config)


def launches(entry: Entry, work) -> list[tuple[int, int]]:
    """First and last phase of each. All phases fit one launch or fail: timing them apart would say nothing of it."""
    return [(0, work.LAST)] if entry.one_launch else work.phases


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

    def failures(self, jobs: list[list[tuple]], seconds: float) -> list[str | None]:
        """The first failure of each job, or None. A job is parts (function, *arguments) that return why they fail, or None."""
        if not self.machine.on_gpu:
            return [None] * len(jobs)
        if self.pool is None:
            processes = min(COMPILERS, os.cpu_count() or 1)
            self.pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
        until = time.monotonic() + seconds

        def failure(part: Future) -> str | None:
            try:
                return part.result(max(until - time.monotonic(), 0))
            except TimeoutError:
                part.cancel()
                return "TimeoutError: not compiled in the time that there was"

        try:
            pending = [[self.pool.submit(*part) for part in job] for job in jobs]
            return [next(filter(None, [failure(part) for part in job]), None) for job in pending]
        except BrokenProcessPool as broken:  # a compiler that aborts takes its process along
            self.pool = None
            return [described(broken)] * len(jobs)


def launch_once(machine: Machine, entry: Entry, problem: Problem, configuration: Configuration, at: int) -> str | None:
    """Compile one launch; why it fails, or None. Few rows do: kernels are not specialized on their number."""
    try:
        work = prepared(entry, configuration, few_rows(problem, machine.device))
        of_work = launches(entry, work)
        if at < len(of_work):
            work.launch(*of_work[at])
            machine.synchronize()
    except Exception as failure:
        return described(failure)
    return None


def variant_once(
    arch: int, shared: int, entry: Entry, configuration: Configuration, launch: tuple[int, int], variant: dict
) -> str | None:
    """Compile one launch of another variant for sm_<arch>; why it does not fit `shared` bytes of shared memory, or None."""
    from tools.resources import compile_kernel

    try:
        needed = compile_kernel(entry.kernel, arch, configuration, *launch, **variant).shared
    except Exception as failure:
        return described(failure)
    if needed > shared:
        return f"OutOfResources: phases {launch} need {needed} bytes of shared memory with {variant}, of {shared}"
    return None


@lru_cache(maxsize=1)
def few_rows(problem: Problem, device: torch.device) -> Operands:
    return Operands(replace(problem, rows=COMPILED_ROWS), device, 0)


def described(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:300]


def changed_launches(entry: Entry, present: Configuration, found: Configuration) -> list[tuple[int, int]]:
    if entry.one_launch:
        return [(0, entry.phases[-1])]
    old, new = ({"phases": {}} | configuration for configuration in (present, found))
    config = triton_runtime.phase_config
    return [(phase, phase) for phase in entry.phases if config(old, phase, phase) != config(new, phase, phase)]


def variants() -> list[dict]:
    """Of the kernels, as arguments of compile_kernel: each needs more than what is timed."""
    from tools.resources import PAIR

    masters, ranks = {"masters": torch.float32}, {"rank": 256, "sub_rank": 128}
    return [masters, {"dtype": torch.float32}, {"absent": PAIR}, ranks, masters | ranks]


class Launches:
    """Runs one entry's kernel on one problem, with any configuration."""

    def __init__(self, compiler: Compiler, entry: Entry, problem: Problem) -> None:
        self.compiler, self.machine, self.entry, self.problem = compiler, compiler.machine, entry, problem
        first = Operands(problem, self.machine.device, 0)
        self.exact = solve(first, entry.kernel)
        # The base weight is not read here: what is has to be cold by itself.
        copies = self.machine.copies(nbytes((first.x, first.dy, first.h, *first.factors())))
        self.sets = [first, *(Operands(problem, self.machine.device, i) for i in range(1, copies))]

    def phases(self, configuration: Configuration) -> list[int]:
        """The phases that are launched."""
        return [first for first, _ in prepared(self.entry, configuration, self.sets[0]).phases]

    def compile(self, configurations: list[Configuration], seconds: float) -> list[str | None]:
        """Why each of them cannot be launched, or None."""
        count = 1 if self.entry.one_launch else len(self.entry.phases)
        jobs = [
            [(launch_once, self.machine, self.entry, self.problem, each, at) for at in range(count)]
            for each in configurations
        ]
        return self.compiler.failures(jobs, seconds)

    def unfit_variant(self, present: Configuration, found: Configuration, seconds: float) -> str | None:
        """Why a variant of the kernel that is not timed here could not be launched with what was found, or None."""
        if not self.machine.on_gpu:
            return None
        major, minor = triton_runtime.capability(self.machine.device)
        shared = torch.cuda.get_device_properties(self.machine.device).shared_memory_per_block_optin
        where = 10 * major + minor, shared, self.entry, found
        jobs = [
            [(variant_once, *where, launch, variant)]
            for launch in changed_launches(self.entry, present, found)
            for variant in variants()
        ]
        return next(filter(None, self.compiler.failures(jobs, seconds)), None)

    def check(self, configuration: Configuration) -> None:
        """Raises if the kernel does not run or its results are wrong."""
        with poisoned(self.machine.device):
            work = prepared(self.entry, configuration, self.sets[0])
            for first, last in launches(self.entry, work):
                work.launch(first, last)
        got = {"y": work.y, "h": work.h} if self.entry.kernel == "forward" else work.grads
        for name, want in self.exact.items():
            error(f"{name} of {self.entry}", got[name], want)

    def times(
        self, configurations: dict[str, Configuration], phase: int | None, rounds: int, seconds: float
    ) -> dict[str, list[float]]:
        """Microseconds of each configuration in alternation, of one phase or of all."""
        segments = ["all"] if phase is None else ["before", "phase"]
        calls = SHORT_CALLS if phase is None and self.machine.on_gpu and self.problem.rows <= SHORT_ROWS else 1
        sets = itertools.cycle(self.sets)  # whoever runs next takes those that nobody has read for longest

        def candidate(configuration: Configuration) -> Candidate:
            def run(_: int, mark: Callable[[], None]) -> None:
                for _ in range(calls):
                    work = prepared(self.entry, configuration, next(sets))
                    for first, last in launches(self.entry, work):
                        if first == phase:
                            mark()
                        work.launch(first, last)
                        if first == phase:
                            break
                mark()

            return run

        runs = {name: candidate(configuration) for name, configuration in configurations.items()}
        times = measure(self.machine, runs, segments, rounds, calls, seconds)
        return {name: found[segments[-1]] for name, found in times.items()}


def solve(s: Operands, kernel: str) -> dict[str, Tensor]:
    """What the kernel has to compute from these operands, in fp64. Sets their h, and as dy their y, as the gate does."""
    p = s.problem.p
    x, *factors = (t.detach().double().requires_grad_(kernel == "backward") for t in s.gradients())
    keep = keep_mask(s.seed, *x.shape, p) if p else None
    y = reference.delta(x, *factors, task=s.task, keep=keep, keep_scale=keep_scale(p), scaling=SCALING)
    dropped = x.detach() if keep is None else x.detach() * keep * keep_scale(p)
    h = dropped @ factors[0].detach().T
    s.dy, s.h = y.detach().to(s.problem.dtype), h.to(s.problem.dtype)
    if kernel == "forward":
        return {"y": y, "h": h}
    return dict(zip(GRADIENTS, torch.autograd.grad(y, [x, *factors], s.dy.double()), strict=True))


# --- search -----------------------------------------------------------------------------------------------------------


def groups(entry: Entry) -> list[tuple[int | None, tuple[str, ...]]]:
    """Constants that are tuned together, each group with the phase whose time decides, or None for that of all."""
    from tools.resources import READ

    shared = SHARED[entry.kernel]
    own = {
        phase: (*sorted(READ[entry.kernel, phase] - set(shared)), "num_warps", "num_stages") for phase in entry.phases
    }
    if entry.one_launch:
        return [(None, (*shared, *dict.fromkeys(itertools.chain(*own.values())), "PROGRAMS"))]
    return [(None, shared), *own.items()]


def neighbours(configuration: Configuration, phase: int | None, names: tuple[str, ...]) -> dict[str, Configuration]:
    """Every configuration one place away in one of these constants, by a name that says the difference."""
    own = configuration.get("phases", {}).get(str(phase), {})
    found = {}
    for name in names:
        present = own.get(name, configuration.get(name, 1))
        smaller = [value for value in VALUES[name] if value < present]
        larger = [value for value in VALUES[name] if value > present]
        for value in smaller[-1:] + larger[:1]:
            where = "" if phase is None else f"phase {phase} "
            found[f"{where}{name} {present} -> {value}"] = changed(configuration, phase, name, value)
    return found


def changed(configuration: Configuration, phase: int | None, name: str, value: int) -> Configuration:
    """With one constant replaced: of the phase when it has a launch of its own, or of all."""
    if phase is None:
        return configuration | {name: value}
    phases = configuration.get("phases", {})
    own = phases.get(str(phase), {}) | {name: value}
    own = {name: value for name, value in own.items() if configuration.get(name) != value}
    phases = {key: constants for key, constants in sorted((phases | {str(phase): own}).items()) if constants}
    common = {name: value for name, value in configuration.items() if name != "phases"}
    return common | ({"phases": phases} if phases else {})


class Search:
    """Goes from one configuration to faster ones, while there are some and `left()`, in seconds, is above 0."""

    def __init__(self, running: Launches, entry: Entry, rounds: int, left: Callable[[], float]) -> None:
        self.running, self.entry, self.rounds, self.left = running, entry, rounds, left
        self.tried: dict[str, str | None] = {}  # configuration -> why it was dropped
        self.dropped: Counter[str] = Counter()

    def run(self, present: Configuration) -> Configuration:
        best, before = present, None
        while best != before and self.left() > 0:
            before = best
            for phase, names in groups(self.entry):
                if phase is None or phase in self.running.phases(best):
                    best = self.climb(present, best, phase, names)
        return best

    def climb(
        self, present: Configuration, best: Configuration, phase: int | None, names: tuple[str, ...]
    ) -> Configuration:
        while self.left() > 0:
            steps = self.usable(neighbours(best, phase, names))
            if not steps:
                break
            times = self.running.times({"present": present, "best": best, **steps}, phase, self.rounds, self.left())
            ratios = {name: ratio(found, times["present"])["median"] for name, found in times.items()}
            step = min(steps, key=ratios.__getitem__)
            if ratios[step] >= STEP * ratios["best"]:
                break
            best = steps[step]
            print(f"{self.entry}: {step}: {ratios[step]:.3f} of the time", flush=True)
        return best

    def usable(self, configurations: dict[str, Configuration]) -> dict[str, Configuration]:
        """Those that run with right results, as far as there is time to know."""
        keys = {name: json.dumps(configuration, sort_keys=True) for name, configuration in configurations.items()}
        new = {name: configuration for name, configuration in configurations.items() if keys[name] not in self.tried}
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


def refusal(ratios: list[dict[str, float]]) -> str | None:
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

    def decide(self, entry: Entry, present: Configuration, until: float) -> dict:
        """What was found for one entry by then, and why it is or is not better."""
        start = self.now()
        print(f"{entry}: {max(until - start, 0):.0f} s", flush=True)
        decision = {
            "plan": entry.plan, "kernel": entry.kernel, "rows": entry.rows, "present": present, "found": None,
            "tried": 0, "dropped": {}, "searched": None, "held_out": [], "improved": False,
        }  # fmt: skip
        try:
            decision["reason"] = self.examine(entry, present, until, decision)
        except Exception as failure:  # one entry takes nothing from the others
            decision["reason"] = described(failure)
        return {**decision, "seconds": round(self.now() - start, 1)}

    def examine(self, entry: Entry, present: Configuration, until: float, decision: dict) -> str:
        """Search, then validation; fills in the decision and returns the reason for it."""
        searching_until = self.now() + SEARCH_SHARE * (until - self.now())
        if self.now() >= searching_until:
            return "no time left"
        found = self.search(entry, present, searching_until, decision)
        if found == present:
            return "nothing faster found" + (" in its time" if self.now() >= searching_until else "")
        decision["found"] = found
        return self.validate(entry, present, found, until, decision)

    def search(self, entry: Entry, present: Configuration, until: float, decision: dict) -> Configuration:
        running = self.running(entry, problems(entry, self.machine.tiny)[0])
        running.compile([present], until - self.now())
        running.check(present)
        search = Search(running, entry, self.machine.rounds, lambda: until - self.now())
        found = search.run(present)
        decision |= {"tried": len(search.tried), "dropped": dict(search.dropped)}
        return found

    def validate(self, entry: Entry, present: Configuration, found: Configuration, until: float, decision: dict) -> str:
        """Puts the ratios of `found` into the decision, and whether it is better; returns why."""

        def compare(running: Launches, problem: Problem) -> dict:
            running.compile([present, found], until - self.now())
            running.check(found)
            times = running.times(
                {"present": present, "found": found}, None, 2 * self.machine.rounds, until - self.now()
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
        why_not = refusal(ratios) or running.unfit_variant(present, found, until - self.now())
        decision["improved"] = why_not is None
        return why_not or f"held-out problems take {geometric_mean(ratios):.3f} of the time"


# --- the table --------------------------------------------------------------------------------------------------------


def tune(
    machine: Machine,
    plans: list[str],
    kernels: list[str],
    rows: list[int],
    minutes: float,
    write: Callable[[dict], None] = lambda decision: None,
    running: Callable[[Compiler, Entry, Problem], Launches] = Launches,
    now: Callable[[], float] = time.monotonic,
) -> tuple[dict | None, list[dict]]:
    """The table in use with better configurations where there are any, else None; and a decision for every entry.

    `write` gets each decision as it is made. Entries that there is no time for keep their configuration. `running` and
    `now` are for tests.
    """
    end = now() + 60 * minutes
    table = copy.deepcopy(triton_runtime.table(triton_runtime.table_names(machine.device)))
    chosen = entries(table, plans, kernels, rows)
    decisions = []
    with Compiler(machine) as compiler:
        tuner = Tuner(machine, partial(running, compiler), now)
        for at, entry in enumerate(chosen):
            buckets = table[entry.plan][entry.kernel]
            place = next(i for i, bucket in enumerate(buckets) if bucket["rows"] == entry.rows)
            present = {name: value for name, value in buckets[place].items() if name != "rows"}
            # A third of what is left: the first entries are worth most, and what one does not need goes to the next.
            decision = tuner.decide(entry, present, now() + (end - now()) / min(3, len(chosen) - at))
            if decision["improved"]:
                buckets[place] = {"rows": entry.rows, **decision["found"]}
            print(f"{entry}: {'IMPROVED' if decision['improved'] else 'kept'}, {decision['reason']}", flush=True)
            write(decision)
            decisions.append(decision)
            if machine.on_gpu:
                torch.cuda.empty_cache()
    return (table if any(decision["improved"] for decision in decisions) else None), decisions


def save(table: dict, path: Path) -> None:
    """Write the table whole or not at all, with a line for each bucket."""
    plans = []
    for plan, kernels in table.items():
        lists = []
        for kernel, buckets in kernels.items():
            lines = ",\n".join(f"      {json.dumps(bucket)}" for bucket in buckets)
            lists.append(f'    "{kernel}": [\n{lines}\n    ]')
        plans.append(f'  "{plan}": {{\n' + ",\n".join(lists) + "\n  }")
    part = path.with_name(path.name + ".part")
    part.write_text("{\n" + ",\n".join(plans) + "\n}\n")
    part.replace(path)


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="a .json file, or a folder for one named for the device"
    )
    parser.add_argument("--plans", help="by_phase, one_launch or both, separated by a comma; all by default")
    parser.add_argument("--kernels", help="forward, backward or both; all by default")
    parser.add_argument("--rows", help="buckets of the table in use, separated by commas; all by default")
    parser.add_argument("--minutes", type=float, default=4.0, help="for everything")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU, with TRITON_INTERPRET=1")
    options = parser.parse_args(arguments)
    machine = Machine.here(ROUNDS, options.tiny)
    if options.tiny and not triton_runtime.INTERPRETED:
        parser.error("--tiny runs in Triton's interpreter; set TRITON_INTERPRET=1 in the environment")
    if options.tiny:
        patch_once_a_launch()
    dtype = torch.float32 if options.tiny else torch.bfloat16
    why_not = triton_runtime.refusal(torch.empty(0, dtype=dtype, device=machine.device), 128, 64)
    if why_not is not None:
        parser.error(
            f"the Triton kernels cannot be timed here: {why_not}; for a run on tiny shapes without a GPU give --tiny"
        )
    names = triton_runtime.table_names(machine.device)
    table = triton_runtime.table(names)

    def chosen(option: str, given: str | None, known: list[str]) -> list[str]:
        found = known if given is None else given.split(",")
        for name in found:
            if name not in known:
                parser.error(f"{option} has {name!r}; the table in use has {', '.join(known)}")
        return found

    plans = chosen("--plans", options.plans, list(table))
    kernels = chosen("--kernels", options.kernels, ["forward", "backward"])
    buckets = {bucket["rows"] for plan in plans for kernel in kernels for bucket in table[plan][kernel]}
    rows = [int(each) for each in chosen("--rows", options.rows, [str(each) for each in sorted(buckets)])]
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes is {options.minutes}; give a finite number above 0")
    path = options.out / f"{names[0] if names else 'cpu'}.json" if options.out.is_dir() else options.out
    if path.suffix != ".json" or not path.parent.is_dir():
        parser.error(f"--out is {options.out}; give a folder that exists, or a .json file in one")

    torch.manual_seed(0)
    better, decisions = tune(machine, plans, kernels, rows, options.minutes)
    if better is None:
        print(f"no configuration is better than the one in use; {path} is not written")
        return 0
    save(better, path)
    improved = sum(decision["improved"] for decision in decisions)
    print(f"{path} is written with {improved} new configurations of {len(decisions)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
