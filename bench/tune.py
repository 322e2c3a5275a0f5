"""Search launch configurations of the Triton kernels, and write those that prove better.

python -m bench.tune --out lilora_kernels/configs             on a GPU
TRITON_INTERPRET=1 python -m bench.tune --out . --tiny        every step on tiny shapes, without one

From the configuration in use, each step tries all that differ from it in one constant by one place in VALUES, and takes
the fastest. A kernel is tuned for the time of its launch, in a forward or backward whose other kernels keep their
configuration. What was found is compared with the configuration in use on held-out problems, in fresh rounds, and written
only if it is better on them and the kernel's other variants (fp32 parameters, larger ranks, a gate) fit the GPU too.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lilora_kernels.ops import triton_runtime
from lilora_kernels.ops.delta import triton_configs

from .interpreter import patch_once_a_launch
from .problems import Problem
from .timing import Machine, ratio
from .tune_launches import KERNELS, ROWS, Compiler, Entry, Launches, Sizes, described, entries, problems

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

Table = dict[str, dict[str, Sizes]]
"""{kernel: {rows: sizes}}, as configs/*.json."""


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
