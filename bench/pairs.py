"""Timing of competing functions in alternation, and a record of where it was done."""

import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

Seconds = dict[str, list[float]]


def alternate(functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> Seconds:
    """Wall time of every function in every round.

    Each round runs all functions, and every other round in reverse order: whatever else the machine does hits all of
    them alike, so the ratio within a round means more than the times themselves.
    """
    seconds: Seconds = {name: [] for name in functions}
    for round_ in range(-warmup, rounds):
        for name, function in sorted(functions.items(), reverse=bool(round_ % 2)):
            start = time.perf_counter()
            function()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Median with the 20th and 80th percentiles."""
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    named = {"median": statistics.median(values), "p20": p20, "p80": p80}
    return {name: round(value, digits) for name, value in named.items()}


def summary(seconds: Seconds, over: str) -> dict:
    """Milliseconds of every function, and the ratio of each to `over` in the same round."""
    return {
        "rounds": len(seconds[over]),
        "ms": {name: spread([1e3 * t for t in times], 2) for name, times in seconds.items()},
        f"ratio_to_{over}": {
            name: spread([t / base for t, base in zip(times, seconds[over], strict=True)], 4)
            for name, times in seconds.items()
            if name != over
        },
    }


def environment() -> dict:
    """Machine, versions, commit and command: what is needed to judge a figure and to repeat it."""
    return {
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "peft", "lilora-kernels")},
        "commit": commit(),
        "command": shlex.join(["pytest", *sys.argv[1:]]),
    }


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The checked-out commit, with "-dirty" when the tree differs from it; "unknown" outside a checkout."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
