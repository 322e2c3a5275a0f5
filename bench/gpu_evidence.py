"""What a GPU shows of the kernels, in one command: python -m bench.gpu_evidence --out FOLDER

Runs from the source tree with the packages that are there; needs no network. Each stage is a process of its own with a
time limit; OUT/results.json and OUT/log.txt are written after each, so that a later failure takes nothing away, and
OUT/clocks.csv while the stages run. Stage 6 leaves OUT/configs.json where it finds better launch configurations. The
last lines are a table (bench/gpu_table.py). The command fails when a stage did: when ours or the base was wrong, broke
off or is missing. --kit FILE takes what `make gpu-kit` made: the CUDA kernels, Triton's compiled kernels, packages.
Without it the CUDA kernels are built first (LILORA_CUDA=1 python setup.py build_ext --inplace) and Triton's compiled ahead,
which --minutes has to allow for. --dry-run does every stage on a CPU with tiny shapes, the kernels interpreted.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import torch

from lilora_kernels import cuda_library

from . import gpu_kit, gpu_table
from .environment import LOAD_FIELDS, age_of_process, clocks, environment, under_load
from .gpu_cases import GO_ON
from .gpu_correctness import TEST_SECONDS

ROOT = Path(__file__).parent.parent
LOG_BYTES = 2 << 20  # of one stage: its end
RESERVE = 12.0  # seconds of the whole that no stage gets
CLOSING = 3.0  # of a stage, for the case that is running when its time is up
LEAST_SECONDS = 12.0  # in which a process that goes on shows anything

FIRST = "first"
TITLES = {
    FIRST: "one call of every backend",
    "0": "GPU tests and memory checkers",
    "1": "ceilings, and F.linear from 1 to 16384 rows",
    "2": "addmm_ in place, beta 0 and 1",
    "3": "linear: forward, backward and both; every launch alone",
    "4": "delta, one_launch and by_phase",
    "5": "decoding in a CUDA graph",
    "6": "search of launch configurations",
    "7": "a LLaVA: layers, training step, generation",
    "8": "Nsight Compute on every launch",
    "9": "linear: compiled peers, and kernels from outside the tree",
}
BUILD_LIMIT = WARM_LIMIT = 200
# Seconds: what a stage may take at most, and what is kept for it from those before it (make gpu-rehearsal: what it rests on).
LIMITS = {FIRST: 60, "0": 130, "1": 30, "2": 25, "3": 170, "4": 60, "5": 75, "6": 300, "7": 240, "8": 120, "9": 300}
KEPT = {FIRST: 42, "0": 108, "1": 18, "2": 15, "3": 145, "4": 42, "5": 60, "6": 108, "7": 60, "8": 60, "9": 0}


@dataclass(frozen=True)
class Stage:
    name: str
    title: str
    command: list[str]  # gets "--into FILE" for its results, a line of JSON each, and "--seconds N" for its time
    limit: float
    kept: float = 0.0


def plan(names: list[str], options: argparse.Namespace) -> list[Stage]:
    """The first call of every backend, then the stages in the order that was asked for."""

    def command(name: str) -> list[str]:
        flags = ["--dry-run"] * options.dry_run
        if name == FIRST:
            return [sys.executable, "-m", "bench.gpu_correctness", "tiny", *flags]
        if name == "0":
            flags += ["--test-seconds", str(TEST_SECONDS * options.scale)]
            flags += [word for path in options.only for word in ("--only", str(path))]
            return [sys.executable, "-m", "bench.gpu_correctness", "all", *flags]
        if name == "6":
            flags += ["--configs", str((options.out / "configs.json").resolve())]
        return [sys.executable, "-m", "bench.gpu_stages", name, *flags]

    return [Stage(name, TITLES[name], command(name), LIMITS[name], KEPT[name]) for name in (FIRST, *names)]


def seconds_for(stage: Stage, later: list[Stage], left: float) -> float:
    """No stage takes what is kept for those after it; where there is less than is kept for all, each has its share."""
    kept = sum(each.kept for each in later)
    share = min(1.0, max(left, 0.0) / max(kept + stage.kept, 1.0))
    return min(stage.limit, left - share * kept)


def variables(dry_run: bool, kit: Path | None) -> dict[str, str]:
    """The environment of the stages. The packages of a kit stand in for those that are missing, behind all others."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    if kit is not None:
        paths.append(str(kit / "site"))
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    found["TORCH_CUDA_ARCH_LIST"] = "9.0a"
    if kit is not None:
        found["TRITON_CACHE_DIR"] = str(kit / "triton")
        if which("file") is None:  # Python asks it for what Triton's cache of launchers is keyed by
            found["PATH"] = f"{gpu_kit.stand_in_for_file(kit)}{os.pathsep}{found['PATH']}"
    return found | ({"TRITON_INTERPRET": "1"} if dry_run else {})


class Evidence:
    """Runs stages and keeps what they found in OUT/results.json and OUT/log.txt."""

    def __init__(self, out: Path, head: dict) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.log, self.file = out / "log.txt", out / "results.json"
        self.content = {"environment": head, "stages": {}}
        self.log.write_text(json.dumps(head, indent=2) + "\n")
        self.save()

    def save(self) -> None:
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        part.replace(self.file)

    def run(self, stage: Stage, seconds: float, env: dict[str, str]) -> bool:
        """One stage within so many seconds; whether all of it went well.

        A process that has lost the device, or its life, is followed by another, which goes on with the next case.
        """
        found: dict = {"title": stage.title, "seconds_given": round(seconds, 1), "clocks_before": clocks()}
        until = time.monotonic() + seconds
        start = time.monotonic()
        more: list[str] = []
        found["results"], text, lost, processes = [], "", False, 1
        cache = Path(env["TRITON_CACHE_DIR"]) if "TRITON_CACHE_DIR" in env else None
        cached = 0 if cache is None else len(list(cache.glob("*")))
        with tempfile.TemporaryDirectory() as folder:
            while True:
                into, output = Path(folder) / "results.jsonl", Path(folder) / "output"
                into.unlink(missing_ok=True)
                left = max(until - time.monotonic(), 1)
                command = [*stage.command, "--into", str(into), "--seconds", f"{max(left - CLOSING, 1):.0f}", *more]
                with output.open("wb") as stream:
                    process = subprocess.Popen(
                        command, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
                    )
                    try:
                        code = process.wait(left)
                    except subprocess.TimeoutExpired:
                        code = None
                    finally:
                        end(process)
                results = lines(into)
                begun = [row for row in results if row.get("case") == "begin"]
                found["results"] += [row for row in results if row.get("case") != "begin"]
                text += output.read_bytes()[-LOG_BYTES:].decode(errors="replace")
                died = code is not None and (code == GO_ON or code < 0)
                lost |= died
                if not died or not begun or begun[-1]["at"] + 1 >= begun[-1]["of"]:
                    break
                if until - time.monotonic() < LEAST_SECONDS:
                    break
                more = ["--start-at", str(begun[-1]["at"] + 1)]
                processes += 1
        found["processes"] = processes
        if cache is not None:
            found["compiled_here"] = len(list(cache.glob("*"))) - cached
        found["status"] = (
            f"stopped after {seconds:.0f} s" if code is None else "a process lost the device" if lost
            else "ok" if code == 0 else f"failed with exit code {code}"
        )  # fmt: skip
        found |= {"seconds": round(time.monotonic() - start, 1), "clocks_after": clocks()}
        self.content["stages"][stage.name] = found
        self.save()
        with self.log.open("a") as log:
            log.write(f"\n===== stage {stage.name}: {stage.title}\n{' '.join(stage.command)}\n{text}\n")
        compiled = f", {found['compiled_here']} new in Triton's cache" if found.get("compiled_here") else ""
        print(f"stage {stage.name} ({stage.title}): {found['status']}, {found['seconds']} s{compiled}", flush=True)
        shown = text.splitlines()
        shown = [line for line in shown[:-6] if line.startswith(("---", "FAILED"))] + shown[-6:]
        print(*(f"  {line[:160]}" for line in shown), sep="\n", flush=True)
        return found["status"] == "ok"


def lines(into: Path) -> list[dict]:
    """The results written so far; a stage that was killed may have left half a line."""
    found = []
    for line in into.read_text().splitlines() if into.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            found.append({"error": "this result was cut off"})
    return found


def end(process: subprocess.Popen) -> None:
    """Stop a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def build_kernels(dry_run: bool, env: dict[str, str], seconds: float) -> dict:
    """The CUDA kernels in this tree, unless they are there or cannot be built: for this machine's GPU alone."""
    if cuda_library.PATH.exists():
        error = None if dry_run else cuda_library.load_error()
        return {"status": "found"} if error is None else {"status": "does not load", "reason": error}
    if dry_run or which("nvcc") is None:
        return {"status": "left out", "reason": "a dry run" if dry_run else "nvcc is not in PATH"}
    if find_spec("cutlass_library") is None:
        return {
            "status": "left out",
            "reason": "the package nvidia-cutlass, which the build for 9.0a needs, is not installed",
        }
    start = time.monotonic()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=env | gpu_kit.BUILD,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=max(seconds, 1))
        status = "ok" if process.returncode == 0 else f"failed with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        end(process)
        text, status = process.communicate()[0], f"stopped after {seconds:.0f} s"
    took = round(time.monotonic() - start, 1)
    return {"status": status, "architecture": "9.0a", "seconds": took, "output": text[-2000:]}


def compile_ahead(names: list[str], folder: Path, env: dict[str, str], seconds: float) -> dict:
    """What the timed stages launch, into Triton's cache: they are run over a GPU that is pretended, on all cores."""
    timed = [name for name in names if name in ("3", "4", "5")]
    command = [sys.executable, "-m", "bench.gpu_kit", str(folder), "--compile-for", torch.cuda.get_device_name()]
    start = time.monotonic()
    process = subprocess.Popen(
        [*command, "--stages", ",".join(timed)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        status = f"ended with exit code {process.wait(max(seconds, 1))}"
    except subprocess.TimeoutExpired:
        status = f"stopped after {seconds:.0f} s"
    end(process)
    return {"status": status, "seconds": round(time.monotonic() - start, 1)}


@contextmanager
def sampled_clocks(path: Path) -> Iterator[None]:
    """Clocks, power and the reasons of throttling in a file, twice a second, while the stages run."""
    command = ["nvidia-smi", f"--query-gpu={LOAD_FIELDS}", "--format=csv,noheader,nounits", "--id=0", "-lms", "500"]
    if which(command[0]) is None:
        yield
        return
    path.write_text(LOAD_FIELDS + "\n")
    with path.open("ab") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            yield
        finally:
            end(process)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", default="2,0,1,3,5,4", help="numbers of stages, in the order in which they run")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--no-warm", action="store_true", help="do not compile ahead; a kit has it already")
    parser.add_argument("--kit", type=Path, help="the file that `make gpu-kit` made")
    parser.add_argument(
        "--only", type=Path, action="append", default=[], help="for stage 0: a test file, to its first failure"
    )
    parser.add_argument("--commit", help="the commit of this tree, where git cannot tell")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="all times so much longer, for a machine that is slower"
    )
    options = parser.parse_args()
    names = options.stages.split(",")
    if not set(names) <= set(TITLES) - {FIRST}:
        known = sorted(set(TITLES) - {FIRST})
        parser.error(f"--stages is {options.stages!r}; give numbers of {known}, separated by commas")
    if options.kit is not None and not options.kit.is_file():
        parser.error(f"--kit is {options.kit}, which is no file; make gpu-kit makes one, and names it")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --dry-run does every stage on a CPU, with tiny shapes")
    # --minutes are those of the machine: importing torch is part of them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what it has started
    deadline = time.monotonic() - min(age_of_process(), 60.0) + options.scale * 60 * options.minutes - RESERVE
    with tempfile.TemporaryDirectory() as folder:
        kit = Path(folder)
        if options.kit is not None:
            gpu_kit.unpack(options.kit, kit, packages="7" in names)
        warm = options.kit is None and not (options.no_warm or options.dry_run) and bool({"3", "4", "5"} & set(names))
        env = variables(options.dry_run, kit if warm or options.kit is not None else None)
        command = shlex.join(["python3", "-m", "bench.gpu_evidence", *sys.argv[1:]])
        head = {"dry_run": options.dry_run, **environment(command, not options.dry_run, options.commit)}
        head["kit"] = None if options.kit is None else gpu_kit.facts(kit)
        evidence = Evidence(options.out, head)
        if warm:
            evidence.content["compiled_ahead"] = compile_ahead(
                names, kit, env, min(WARM_LIMIT, deadline - time.monotonic())
            )
            print(f"compiled ahead: {evidence.content['compiled_ahead']}", flush=True)
        with sampled_clocks(options.out / "clocks.csv"):
            failed = run_all(evidence, names, options, env, deadline)
    return int(bool(failed))


def run_all(
    evidence: Evidence, names: list[str], options: argparse.Namespace, env: dict[str, str], deadline: float
) -> list[str]:
    """Every stage, and the closing table; returns what failed."""
    built = build_kernels(options.dry_run, env, min(BUILD_LIMIT, deadline - time.monotonic()))
    evidence.content["cuda_build"] = built
    print(f"CUDA kernels: {built}", flush=True)
    failed = [] if built["status"] in ("ok", "found", "left out") else ["CUDA kernels"]
    stages = plan(names, options)
    for at, stage in enumerate(stages):
        left = (deadline - time.monotonic()) / options.scale
        seconds = options.scale * seconds_for(stage, stages[at + 1 :], left)
        if seconds < 2:
            evidence.content["stages"][stage.name] = {"title": stage.title, "status": "no time left"}
            evidence.save()
            failed.append(stage.name)
        elif not evidence.run(stage, seconds, env):
            failed.append(stage.name)
    evidence.content["under_load"] = under_load(evidence.file.with_name("clocks.csv"))
    evidence.save()
    text = gpu_table.table(evidence.content)
    evidence.file.with_name("table.txt").write_text(text + "\n")
    print(text[-gpu_table.PRINTED :])
    print(f"{evidence.file} and {evidence.log} are written; failed stages: {', '.join(failed) or 'none'}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
