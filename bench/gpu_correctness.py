"""Stage 0 of `bench.gpu_evidence`: the GPU tests and the memory checkers. python -m bench.gpu_correctness [--into FILE]

`tiny` as an argument makes one small call each way: what a memory checker watches.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from shutil import which
from xml.etree import ElementTree

import torch
from torch import Tensor

from lilora_kernels import backend, rank_gate
from lilora_kernels.ops.call import DIFFERENTIABLE, Call

from .gpu_stages import kernels_of
from .problems import GRADIENTS, SCALING, TINY, Operands, Problem

ROOT = Path(__file__).parent.parent


def tiny(dry_run: bool) -> None:
    """One call each way, in one launch and by phase, by every backend with kernels, small enough for a memory checker."""
    problem = Problem(40, *TINY, 3, 0.1, 16, 8, torch.float32 if dry_run else torch.bfloat16)
    s = Operands(problem, torch.device("cpu"), 0)  # random numbers from a GPU would be watched too
    device = "cpu" if dry_run else "cuda"
    moved = {name: t.detach().to(device) for name, t in vars(s).items() if isinstance(t, Tensor)}
    adapter = (moved[name] for name in DIFFERENTIABLE[1:6])
    call = Call(*adapter, moved["task"], None, None, moved["seed"], SCALING, problem.p, None)
    for name, kernels in kernels_of(problem, moved["x"]).items():
        for one_launch in (True, False):
            kernels.run_forward(moved["x"], None, call, one_launch)
            kernels.run_backward(moved["dy"], moved["x"], moved["h"], call, frozenset(GRADIENTS), one_launch)
        if name == "cuda":  # decoding, with the base's weight
            kernels.run_forward(moved["x"], None, call, False, moved["weight"])
        if name == "triton":
            with backend(name):
                rank_gate(moved["x"], 5)
        if not dry_run:
            torch.cuda.synchronize()
        print(f"tiny: {name} done")


def check(dry_run: bool, seconds: float, write: Callable[[dict], None]) -> int:
    """The GPU tests, a process for each file, and the memory checkers, all at the same time."""
    deadline = time.monotonic() + seconds
    checker = which("compute-sanitizer") or which("/usr/local/cuda/bin/compute-sanitizer")
    tiny_command = [sys.executable, "-m", "bench.gpu_correctness", "tiny"] + ["--dry-run"] * dry_run
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        tests = ROOT / "tests" / "gpu"
        # A file named on the command line is collected in any case, a folder's only where there is a GPU.
        for target in [tests] if dry_run else sorted(tests.glob("test_*.py")):
            report = Path(folder) / f"{target.stem}.xml"
            pytest = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-ra",
                "--tb=short",
                "--durations=5",
                "-p",
                "no:cacheprovider",
            ]
            jobs[target.name] = [*pytest, f"--junitxml={report}", str(target)]
        if checker is not None:
            for tool in ("memcheck", "racecheck", "synccheck"):
                jobs[tool] = [checker, "--tool", tool, "--error-exitcode", "9", *tiny_command]
        else:
            jobs["tiny"] = tiny_command
            write({"case": "memcheck, racecheck and synccheck", "error": "compute-sanitizer is not on this machine"})
        # Without the caching allocator every tensor is an allocation of its own, with ends that memcheck knows.
        plain = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        started = time.monotonic()
        running = {}
        for name, command in jobs.items():
            with (Path(folder) / f"{name}.log").open("wb") as log:
                environment = plain if name in ("memcheck", "racecheck", "synccheck") else None
                running[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while running:
            time.sleep(0.1)
            late = time.monotonic() > deadline
            if late:  # pytest, interrupted, writes what it knows
                for process in running.values():
                    process.send_signal(signal.SIGINT)
                time.sleep(8)
            for name, process in list(running.items()):
                code = process.poll()
                if code is None and not late:
                    continue
                del running[name]
                result = {"case": name, "seconds": round(time.monotonic() - started, 1), "exit_code": code}
                if late:
                    process.kill()
                    result["error"] = f"stopped after {seconds:.0f} s"
                result |= outcomes(Path(folder) / f"{Path(name).stem}.xml")
                # 5: pytest found no tests, as on a machine without a GPU.
                failed += code not in ((0, 5) if dry_run else (0,))
                write(result)
                text = (Path(folder) / f"{name}.log").read_text(errors="replace")
                print(
                    f"{text[-100_000:]}\n--- {name}: {json.dumps({k: v for k, v in result.items() if k != 'failures'})}"
                )
    return failed


def outcomes(report: Path) -> dict:
    """Counts and failures of pytest's JUnit file, if there is one."""
    if not report.is_file():
        return {}
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    broken = {case: fault for case in cases for fault in case if fault.tag in ("failure", "error")}
    skipped = sum(1 for case in cases if case.find("skipped") is not None)
    return {
        "tests": len(cases),
        "passed": len(cases) - len(broken) - skipped,
        "failures": [
            {"test": case.get("name"), "message": (fault.get("message") or "")[:1000]} for case, fault in broken.items()
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["all", "tiny"], default="all")
    parser.add_argument("--into", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--seconds", type=float, default=200.0)
    options = parser.parse_args()
    if options.what == "tiny":
        tiny(options.dry_run)
        return 0

    def write(result: dict) -> None:
        if options.into is not None:
            with options.into.open("a") as file:
                file.write(json.dumps(result) + "\n")

    return int(check(options.dry_run, options.seconds, write) > 0)


if __name__ == "__main__":
    sys.exit(main())
