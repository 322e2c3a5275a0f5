"""Stage 0 of `bench.gpu_evidence`: the GPU tests and the memory checkers. python -m bench.gpu_correctness [--into FILE]

`tiny` as an argument makes one small call each way: what a memory checker watches.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from types import ModuleType
from xml.etree import ElementTree

import torch
from torch import Tensor

from lilora_kernels import backend, cuda_library, rank_gate
from lilora_kernels.backends import unsupported_reasons
from lilora_kernels.ops.linear.cuda_backend import DECODE_ROWS, unsupported_call
from lilora_kernels.ops.schema import DIFFERENTIABLE, AdapterArgs

from .environment import age_of_process
from .gpu_stages import kernels_of
from .interpreter import patch_once_a_launch
from .problems import GRADIENTS, SCALING, TINY, Operands, Problem

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests/gpu"
CHECKERS = ("memcheck", "racecheck", "synccheck")
LARGE = {"test_gpu_delta.py", "test_gpu_linear.py"}  # worked on by several processes each
WORKERS = max(1, min(6, (os.cpu_count() or 1) // 2))  # for each of them
TEST_SECONDS = 60.0  # of one test
INTERRUPTED = 8.0  # seconds that pytest gets to write what it knows


def problems(dry_run: bool) -> list[Problem]:
    """A ragged one, and one whose tiles are whole: what a memory checker has time for."""
    dtype = torch.float32 if dry_run else torch.bfloat16
    ragged = Problem(40, *TINY, 3, 0.1, 16, 8, dtype)
    return [ragged] if dry_run else [ragged, Problem(300, 256, 384, 3, 0.1, 128, 64, dtype)]


def tiny(dry_run: bool, write: Callable[[dict], None]) -> int:
    """Calls each way, in one launch and by phase, by every backend with kernels; how many failed, and one if none ran."""
    failed = ran = 0
    device = "cpu" if dry_run else "cuda"
    for problem in problems(dry_run):
        s = Operands(problem, torch.device("cpu"), 0)  # random numbers from a GPU would be watched too
        moved = {name: t.detach().to(device) for name, t in vars(s).items() if isinstance(t, Tensor)}
        factors = (moved[name] for name in DIFFERENTIABLE[1:6])
        adapter = AdapterArgs(*factors, moved["task"], None, None, moved["seed"], SCALING, problem.p, None)
        for name, kernels in kernels_of(problem, moved["x"]).items():
            result = {"case": "tiny", **problem.describe(), "implementation": name}
            try:
                call_each_way(name, kernels, moved, adapter)
                if not dry_run:
                    torch.cuda.synchronize()
                ran += 1
            except Exception as error:
                traceback.print_exc()
                failed += 1
                result["error"] = f"{type(error).__name__}: {error}"[:500]
            write(result)
            print(f"--- tiny: {result}", flush=True)
        for name, reason in unsupported_reasons("delta", moved["x"], problem.rank, problem.sub_rank).items():
            if reason is not None:
                write({"case": "tiny", **problem.describe(), "implementation": name, "unavailable": reason})
                print(f"--- tiny: {name} is not available: {reason}", flush=True)
                failed += name == "cuda" and cuda_library.PATH.exists() and not dry_run  # it was built, to run here
    return failed or int(ran == 0)


def call_each_way(name: str, kernels: ModuleType, moved: dict[str, Tensor], adapter: AdapterArgs) -> None:
    for one_launch in (True, False):
        kernels.run_forward(moved["x"], None, adapter, one_launch)
        kernels.run_backward(moved["dy"], moved["x"], moved["h"], adapter, frozenset(GRADIENTS), one_launch)
    if name == "cuda" and len(moved["x"]) <= DECODE_ROWS:  # decoding, with the base's weight
        kernels.run_forward(moved["x"], None, adapter, False, moved["weight"])
    if (
        name == "cuda" and unsupported_call(moved["x"], moved["weight"], adapter) is None
    ):  # base and adapter in one product
        _, h = kernels.run_fused_forward(moved["x"], moved["weight"], None, adapter)
        kernels.run_backward(moved["dy"], moved["x"], h, adapter, frozenset(GRADIENTS), False, moved["weight"])
    if name == "triton":
        with backend(name):
            rank_gate(moved["x"], 5)


def test_files() -> list[Path]:
    """The largest first; those of the fused product only where it was built. There they fail if another plan runs."""
    files = sorted(TESTS.glob("test_*.py"), key=lambda path: -path.stat().st_size)
    return [path for path in files if path.name != "test_gpu_fused.py" or cuda_library.has_hopper()]


def check(dry_run: bool, seconds: float, test_seconds: float, only: list[Path], write: Callable[[dict], None]) -> int:
    """The GPU tests, a process for each file or more, and the memory checkers, all at the same time; how many failed.

    `only` these test files, each up to its first failure, where a run before this one has found them failing.
    """
    deadline = time.monotonic() + seconds - INTERRUPTED
    checker = which("compute-sanitizer") or which("/usr/local/cuda/bin/compute-sanitizer")
    tiny_command = [sys.executable, "-m", "bench.gpu_correctness", "tiny"] + ["--dry-run"] * dry_run
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        files = [path for path in only if path.name not in CHECKERS]
        tools = [path.name for path in only if path.name in CHECKERS] or CHECKERS
        # A file named on the command line is collected in any case, a folder's only where there is a GPU.
        for target in [TESTS] if dry_run else files if only else test_files():
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
            if find_spec("pytest_timeout") is not None:  # a thread: a test that hangs in the driver hears no signal
                pytest += [f"--timeout={test_seconds}", "--timeout-method=thread"]
            if files:
                pytest += ["-x"]
            if find_spec("xdist") is not None:  # a hanging test takes its worker along, and none of the other tests
                pytest += ["-n", str(WORKERS if target.name in LARGE else 1)]
            jobs[target.name] = [*pytest, f"--junitxml={Path(folder) / target.stem}.xml", str(target)]
        if checker is not None:
            # torch raises for errors of CUDA's functions itself; what it only tries is no error of ours.
            options = ["--error-exitcode", "9", "--report-api-errors", "no"]
            for tool in tools:
                jobs[tool] = [checker, "--tool", tool, *options, *tiny_command]
        else:
            write({"case": "memcheck, racecheck and synccheck", "error": "compute-sanitizer is not on this machine"})
        # Without the caching allocator every tensor is an allocation of its own, with ends that memcheck knows.
        shared = {**os.environ, "OMP_NUM_THREADS": "1"}  # dozens of processes share the cores
        plain = {**shared, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background hands down that it is ignored
        started = time.monotonic()
        running = {}
        for name, command in jobs.items():
            with (Path(folder) / f"{name}.log").open("wb") as log:
                environment = plain if name in CHECKERS else shared
                running[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while running:
            time.sleep(0.1)
            late = time.monotonic() > deadline
            if late:  # pytest, interrupted, writes what it knows
                for process in running.values():
                    process.send_signal(signal.SIGINT)
                time.sleep(INTERRUPTED - 1)
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
                text = (Path(folder) / f"{name}.log").read_text(errors="replace")
                if name in CHECKERS and "Device not supported" in text:
                    result["unavailable"] = "compute-sanitizer does not support this device"
                # 5: pytest found no tests, as on a machine without a GPU.
                failed += code not in ((0, 5) if dry_run else (0,)) and "unavailable" not in result
                write(result)
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
    backends: dict[str, dict[str, int]] = {}
    for case in cases:
        name = re.search(r"[\[-](cuda|triton|eager)[\]-]", case.get("name") or "")
        counts = backends.setdefault(name[1] if name else "other", {"tests": 0, "passed": 0})
        counts["tests"] += 1
        counts["passed"] += case not in broken and case.find("skipped") is None
    return {
        "tests": len(cases),
        "passed": len(cases) - len(broken) - skipped,
        "backends": backends,
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
    parser.add_argument("--test-seconds", type=float, default=TEST_SECONDS, help="for one test")
    parser.add_argument(
        "--only", type=Path, action="append", default=[], help="a test file, up to its first failure, or a checker"
    )
    options = parser.parse_args()

    def write(result: dict) -> None:
        if options.into is not None:
            with options.into.open("a") as file:
                file.write(json.dumps(result) + "\n")

    options.seconds -= age_of_process()  # they count from the start of the process
    if options.dry_run:
        patch_once_a_launch()
    if options.what == "tiny":
        return int(tiny(options.dry_run, write) > 0)
    return int(check(options.dry_run, options.seconds, options.test_seconds, options.only, write) > 0)


if __name__ == "__main__":
    sys.exit(main())
