"""The cases of a stage: run one after another, so that what befalls one takes nothing from the others."""

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from .problems import Problem
from .timing import Ceilings, Machine, ceilings

GO_ON = 75  # the exit code that asks for another process


@dataclass(frozen=True)
class Case:
    """`run(machine, ceilings)` yields results; the case has failed without a figure of each of the implementations `must`.

    An extra case may be left out when the time is up.
    """

    name: str
    run: Callable[[Machine, Ceilings], Iterator[dict]]
    must: tuple[str, ...] = ()
    extra: bool = False


class LostDevice(Exception):
    """What follows in this process could not be believed, such as after a capture that broke off."""


@dataclass
class Outcome:
    """How a stage went: what failed, how many cases were left out, and where another process has to go on."""

    failed: list[str] = field(default_factory=list)
    left_out: int = 0
    go_on_at: int | None = None

    @property
    def exit_code(self) -> int:
        return int(bool(self.failed)) if self.go_on_at is None else GO_ON


def run_cases(
    cases: list[Case], machine: Machine, write: Callable[[dict], None], seconds: float = float("inf"), start_at: int = 0
) -> Outcome:
    """Every case from `start_at` on, whatever happens to others, while there is time for one as long as those so far.

    A row of the case "begin" is written before each, so that whoever started this process knows where another has to go on.
    """
    outcome = Outcome()
    until, longest = time.monotonic() + seconds, 0.0
    ceiling = ceilings(machine, torch.bfloat16 if machine.on_gpu else torch.float32)

    def fail(case: Case, reason: str, **more) -> None:
        given = case.run.args[0] if isinstance(case.run, partial) else None
        shape = given.describe() if isinstance(given, Problem) else {}
        outcome.failed.append(reason)
        write({"case": case.name, **shape, **more, "error": reason[:500]})
        print(f"FAILED: {reason}", flush=True)

    for at, case in enumerate(cases[start_at:], start_at):
        if time.monotonic() + longest > until:
            left = cases[at:]
            outcome.left_out = len(left)
            write({"case": "left out", "note": f"{len(left)} cases, for the time was up"})
            for missed in left:
                if not missed.extra:
                    fail(missed, "there was no time for this case, which may not be missing")
            break
        start = time.monotonic()
        write({"case": "begin", "at": at, "of": len(cases)})
        found = set()
        try:
            for result in case.run(machine, ceiling):
                write({"case": case.name, **result})
                print(brief({"case": case.name, **result}), flush=True)
                name = str(result.get("implementation", ""))
                if "us" in result:
                    found.add(name)
                elif "error" in result and name.startswith(("base", "ours")):
                    outcome.failed.append(f"{name}: {result['error']}")
            for name in sorted(set(case.must) - found):
                fail(case, f"no figure of {name}, which may not be missing", implementation=name)
        except Exception as error:
            traceback.print_exc()
            fail(case, f"{type(error).__name__}: {error}")
            if isinstance(error, LostDevice) or lost(machine):
                outcome.go_on_at = at + 1
                break
        if machine.on_gpu:
            gc.collect()  # models are cycles of objects, and an error holds what its case made
            torch.cuda.empty_cache()
        longest = max(longest, time.monotonic() - start)
        print(f"  {time.monotonic() - start:.1f} s", flush=True)
    return outcome


def lost(machine: Machine) -> bool:
    """Whether the device answers this process with errors from now on."""
    try:
        machine.synchronize()
    except Exception:
        return True
    return False


def brief(result: dict) -> str:
    """One line of a table."""
    names = ("case", "M", "K", "N", "T", "p", "implementation", "direction", "job")
    cells = [str(result[name]) for name in names if name in result]
    if "us" in result:
        cells.append(f"{result['us']['median']:.1f} us")
    if "percent_of_floor" in result:
        cells.append(f"{result['percent_of_floor']:.0f} % of floor")
    cells += [f"{name}: {result[name]}" for name in ("unavailable", "error", "reason") if name in result]
    for name in ("ratio_to_base", "ratio_to_by_phase"):
        if name in result:
            cells.append(f"x{result[name]['median']:.3f}")
    cells += [f"{name} {result[name]}" for name in ("copy_gb_per_s", "matmul_tflop_per_s") if name in result]
    return "  ".join(cells)
