"""What a GPU shows of the kernels, in one command: python -m bench.gpu_evidence --out FOLDER

Runs from the source tree with the packages that are there; needs no network. Each stage is a process of its own with a
time limit; OUT/results.json and OUT/log.txt are written after each, so that a later failure takes nothing away. Stage 6
leaves OUT/configs.json where it finds better launch configurations. The CUDA kernels are built first where they are not
there yet (LILORA_CUDA=1 python setup.py build_ext --inplace). The command fails when a stage did. --dry-run does
every stage on a CPU with tiny shapes, the kernels interpreted.
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
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from .environment import clocks, environment

ROOT = Path(__file__).parent.parent
LOG_BYTES = 2 << 20  # of one stage: its end
WARM_PROCESSES = 8
RESERVE = 15.0  # seconds of the whole that no stage gets

TITLES = {
    0: "GPU tests and memory checkers",
    1: "ceilings, and F.linear from 1 to 16384 rows",
    2: "addmm_ in place, beta 0 and 1",
    3: "linear: forward, backward and both; every launch alone",
    4: "delta in one launch and by phase",
    5: "decoding in a CUDA graph",
    6: "search of launch configurations",
    7: "a LLaVA: layers, training step, generation",
    8: "Nsight Compute on every launch",
    9: "linear: compiled peers, and kernels from outside the tree",
}
BUILD_LIMIT = 200
LIMITS = {0: 210, 1: 60, 2: 45, 3: 160, 4: 80, 5: 90, 6: 300, 7: 240, 8: 120, 9: 300}  # seconds


@dataclass(frozen=True)
class Stage:
    number: int
    title: str
    command: list[str]  # gets "--into FILE" for its results, a line of JSON each
    limit: float


def plan(numbers: list[int], dry_run: bool, minutes: float, out: Path) -> list[Stage]:
    def command(number: int) -> list[str]:
        flags = ["--dry-run"] * dry_run
        if number == 0:
            seconds = min(LIMITS[0], 60 * minutes - RESERVE) - 12
            return [sys.executable, "-m", "bench.gpu_correctness", *flags, "--seconds", str(seconds)]
        if number == 6:
            flags += ["--configs", str((out / "configs.json").resolve())]
        return [sys.executable, "-m", "bench.gpu_stages", str(number), *flags]

    return [Stage(n, TITLES[n], command(n), LIMITS[n]) for n in numbers]


def variables(dry_run: bool) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    found["TORCH_CUDA_ARCH_LIST"] = "9.0a"
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
        """One stage within so many seconds; whether all of it went well."""
        found: dict = {"title": stage.title, "clocks_before": clocks()}
        with tempfile.TemporaryDirectory() as folder:
            into, output = Path(folder) / "results.jsonl", Path(folder) / "output"
            start = time.monotonic()
            with output.open("wb") as stream:
                process = subprocess.Popen(
                    [*stage.command, "--into", str(into)],
                    cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                try:
                    code = process.wait(max(seconds, 1))
                    found["status"] = "ok" if code == 0 else f"failed with exit code {code}"
                except subprocess.TimeoutExpired:
                    found["status"] = f"stopped after {seconds:.0f} s"
                finally:
                    end(process)
            found |= {"seconds": round(time.monotonic() - start, 1), "clocks_after": clocks(), "results": lines(into)}
            text = output.read_bytes()[-LOG_BYTES:].decode(errors="replace")
        self.content["stages"][str(stage.number)] = found
        self.save()
        with self.log.open("a") as log:
            log.write(f"\n===== stage {stage.number}: {stage.title}\n{' '.join(stage.command)}\n{text}\n")
        print(f"stage {stage.number} ({stage.title}): {found['status']}, {found['seconds']} s", flush=True)
        shown = text.splitlines()
        shown = [line for line in shown[:-20] if line.startswith("---")] + shown[-20:]
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
    if (ROOT / "lilora_kernels/lib/liblilora_cuda.so").exists():
        return {"status": "found"}
    if dry_run or which("nvcc") is None:
        return {"status": "left out", "reason": "a dry run" if dry_run else "nvcc is not in PATH"}
    # Without CUTLASS's headers no fused product: the build for 9.0 leaves it out.
    architecture = "9.0a" if find_spec("cutlass_library") else "9.0"
    start = time.monotonic()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=env | {"LILORA_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=max(seconds, 1))
        status = "ok" if process.returncode == 0 else f"failed with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        end(process)
        text, status = process.communicate()[0], f"stopped after {seconds:.0f} s"
    took = round(time.monotonic() - start, 1)
    return {"status": status, "architecture": architecture, "seconds": took, "output": text[-2000:]}


def start_warming(dry_run: bool, env: dict[str, str]) -> list[subprocess.Popen]:
    """Compile the kernels of the timed stages beside stage 0, on other cores. A dry run does one part of it."""
    count = 3 if dry_run else WARM_PROCESSES
    return [
        subprocess.Popen(
            [sys.executable, "-m", "bench.gpu_stages", "warm", "--part", str(part), str(count)] + ["--dry-run"] * dry_run,
            cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )
        for part in ([count - 1] if dry_run else range(count))
    ]  # fmt: skip


def finish_warming(processes: list[subprocess.Popen], deadline: float) -> list[int | None]:
    """Exit codes; None for a process that had to be stopped. Nothing of them runs on beside a timed stage."""
    codes: list[int | None] = []
    for process in processes:
        try:
            codes.append(process.wait(max(deadline - time.monotonic(), 0)))
        except subprocess.TimeoutExpired:
            codes.append(None)
        end(process)
    return codes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", default="0,1,2,3,4,5")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--commit", help="the commit of this tree, where git cannot tell")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    options = parser.parse_args()
    try:
        numbers = [int(number) for number in options.stages.split(",")]
    except ValueError:
        numbers = [-1]
    if not set(numbers) <= set(TITLES):
        parser.error(f"--stages is {options.stages!r}; give numbers of {sorted(TITLES)}, separated by commas")
    deadline = time.monotonic() + 60 * options.minutes - RESERVE
    env = variables(options.dry_run)
    command = shlex.join(["python3", "-m", "bench.gpu_evidence", *sys.argv[1:]])
    head = {"dry_run": options.dry_run, **environment(command, not options.dry_run, options.commit)}
    evidence = Evidence(options.out, head)
    evidence.content["cuda_build"] = build_kernels(options.dry_run, env, min(BUILD_LIMIT, deadline - time.monotonic()))
    print(f"CUDA kernels: {evidence.content['cuda_build']}", flush=True)
    failed = [] if evidence.content["cuda_build"]["status"] in ("ok", "found", "left out") else ["CUDA kernels"]
    warming = start_warming(options.dry_run, env) if {3, 4, 5} & set(numbers) else []
    try:
        for stage in plan(numbers, options.dry_run, options.minutes, options.out):
            if stage.number > 0 and warming:
                codes = finish_warming(warming, min(deadline, time.monotonic() + 90))
                evidence.content["warming"] = {"exit_codes": codes}
                warming = []
            left = deadline - time.monotonic()
            if left < 2:
                evidence.content["stages"][str(stage.number)] = {"title": stage.title, "status": "no time left"}
                evidence.save()
                failed.append(stage.number)
            elif not evidence.run(stage, min(stage.limit, left), env):
                failed.append(stage.number)
    finally:
        finish_warming(warming, time.monotonic())
    print(f"{evidence.file} and {evidence.log} are written; failed stages: {failed or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
