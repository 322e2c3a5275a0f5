"""The two commands for a GPU, tried without one: python -m bench.gpu_rehearsal KIT  (make gpu-rehearsal)

In another checkout of this commit and with the kit's Python, over a GPU that computes nothing (bench/pretended_gpu):
1. Command 1 as `make gpu-kit` prints it, then command 2 as it is chosen after a good run on an H100, after one on an H200
   and after a bad one. No kernel may be compiled: every one has to come from the kit.
2. A wrong kernel, one that hangs and a figure that is missing are planted; each has to end red, within its limit.
The last lines say how many kernels were launched, found and missed, and how long each stage would take: on what that rests
is said beside it. Red stages of the good runs, a miss or a fault that passes unseen make this command fail.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from .environment import commit
from .gpu_evidence import KEPT, TITLES
from .gpu_kit import DEVICES, commands, pretended

ROOT = Path(__file__).parent.parent
H100, H200 = DEVICES
SLOWER = (
    30  # how much longer than its limit a stage may take here, where no result is real and two cores do the work of 16
)
# The model of time, for the machine with a GPU: what pretended_gpu counts, at these prices.
START_S = 9.0  # a Python process that imports torch, makes a context and loads cuBLAS
LOAD_S = 0.012  # a kernel from Triton's cache
OPERATION_S, LAUNCH_S = 20e-6, 150e-6  # Python's and torch's part of an operation, and of a launch of many arguments
TEST_PROCESSES = 12  # that share the GPU tests


WRONG = """
import lilora_kernels.ops.delta.triton_backend as kernels
own = kernels.run_forward
def run_forward(*arguments):
    y, h = own(*arguments)
    if len(y):
        y[-1, -1] += 1
    return y, h
kernels.run_forward = run_forward
"""
HANGS = """
import time
import lilora_kernels.ops.delta.triton_backend as kernels
kernels.run_forward = lambda *arguments: time.sleep(3600)
"""
MISSING = """
from dataclasses import replace
from bench import peers
def unavailable(*arguments):
    raise peers.Unavailable("it was taken away")
peers.PEERS["ours"] = replace(peers.PEERS["ours"], build=unavailable)
"""
PLANTS = {  # the fault, the stage that it is planted in, and what has to be said of it
    "a wrong kernel": (WRONG, "4", "y of delta is wrong by"),
    "a kernel that hangs": (HANGS, "4", "stage 4 (delta, one_launch and by_phase): stopped after"),
    "a missing figure": (MISSING, "5", "no figure of ours, which may not be missing"),
}
PLANT_MINUTES = 1.2


class Rehearsal:
    def __init__(self, kit: Path, folder: Path) -> None:
        self.kit, self.folder, self.checkout = kit, folder, folder / "elsewhere" / "tree"
        self.faults: list[str] = []
        subprocess.run(["git", "clone", "-q", str(ROOT), str(self.checkout)], check=True)

    def environment(self, device: str, log: Path) -> dict[str, str]:
        """That of the pretended GPU, with this checkout's files, and tools that answer for the card."""
        found = pretended(device, self.folder, log)
        bench = self.checkout / "bench/pretended_gpu"
        found["PYTHONPATH"] = os.pathsep.join([str(bench), str(self.checkout), str(self.checkout / "python")])
        found["PATH"] = f"{bench / 'bin'}{os.pathsep}{found['PATH']}"
        return found | {"PYTEST_ADDOPTS": "--assert=plain"}

    def run(self, title: str, command: str, out: Path, device: str = H100) -> list[dict]:
        """One of the printed commands; what its processes launched."""
        log = out.with_suffix(".log")
        env = self.environment(device, log) | {"OUT": str(out)}
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # its python3
        command = command.replace("/tmp/first.json", str(self.folder / "first.json"))
        slower = command.replace("--minutes", f"--scale {SLOWER} --minutes")
        start = time.monotonic()
        with out.with_suffix(".txt").open("wb") as stream:
            done = subprocess.run(
                ["bash", "-c", slower], cwd=self.checkout, env=env, stdout=stream, stderr=stream, check=False
            )
        code = done.returncode
        print(f"{title}: exit code {code}, {time.monotonic() - start:.0f} s here", flush=True)
        if code:
            self.faults.append(f"{title} ended with {code}")
            print(out.with_suffix(".txt").read_text(errors="replace")[-6000:])
        return processes(log)


def processes(log: Path) -> list[dict]:
    """What every process that ended launched, with the kernels that it found in the cache and those it missed."""
    kinds: dict[str, Counter] = defaultdict(Counter)
    found = []
    for line in log.read_text().splitlines() if log.is_file() else ():
        kind, process, what = line.split(" ", 2)
        if kind == "process":
            found.append(json.loads(what) | {"pid": process})
        else:
            kinds[process][kind] += 1
            kinds[process][f"{kind} {what}"] += 1
    for entry in found:
        entry |= {"hit": kinds[entry["pid"]].pop("hit", 0), "miss": kinds[entry["pid"]].pop("miss", 0)}
    ended = {entry["pid"] for entry in found}
    return found + [
        {"command": ["killed"], "hit": kind["hit"], "miss": kind["miss"]}
        for pid, kind in kinds.items()
        if pid not in ended
    ]


def stage_of(entry: dict) -> str:
    words = [Path(word).name for word in entry["command"]]
    if "gpu_stages.py" in words[:1]:
        return "8" if words[1:2] == ["call"] else words[1]
    if "gpu_correctness.py" in words[:1]:
        return "first" if "tiny" in words else "other"
    return "0" if words[0] in ("-c", "__main__.py") else "other"


def estimate(entries: list[dict]) -> dict[str, dict]:
    """Seconds of each stage on a machine with a GPU, by the model above."""
    found: dict[str, dict] = {}
    for entry in entries:
        line = found.setdefault(stage_of(entry), Counter())
        line["processes"] += 1
        for name in ("hit", "miss", "operations", "launches", "gpu_s"):
            line[name] += entry.get(name, 0)
    for name, line in found.items():
        host = line["operations"] * OPERATION_S + line["launches"] * LAUNCH_S + line["hit"] * LOAD_S
        shared = TEST_PROCESSES if name == "0" else 1
        line["seconds"] = START_S * (2 if name == "0" else 1) + line["gpu_s"] + host / shared
    return found


def plant(title: str, folder: Path, python: Path) -> str | None:
    """Run one stage with a fault in it, on real numbers in Triton's interpreter; why the fault passed unseen, or None."""
    code, stage, said = PLANTS[title]
    site, out = folder / title.replace(" ", "-"), folder / f"{title.replace(' ', '-')}-out"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
    command = [str(python), "-m", "bench.gpu_evidence", "--out", str(out), "--stages", stage, "--dry-run"]
    start = time.monotonic()
    done = subprocess.run(
        [*command, "--minutes", str(PLANT_MINUTES)], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    took = time.monotonic() - start
    print(f"{title}, planted in stage {stage}: exit code {done.returncode}, {took:.0f} s", flush=True)
    print("  " + "\n  ".join(line for line in done.stdout.splitlines() if "FAILED" in line or line.startswith("stage")))
    if done.returncode != 1 or said not in done.stdout:
        return f"{title} passed unseen: {done.stdout[-500:]}{done.stderr[-500:]}"
    return f"{title} took {took:.0f} s" if took > 60 * PLANT_MINUTES + 5 else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kit", type=Path)
    parser.add_argument(
        "--interpreter", type=Path, default=sys.executable, help="a Python whose Triton can interpret kernels"
    )
    options = parser.parse_args()
    one, two = commands(str(options.kit.resolve()), commit())
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as name:
        folder = Path(name)
        rehearsal = Rehearsal(options.kit, folder)
        for title in PLANTS:
            if (fault := plant(title, folder, options.interpreter.absolute())) is not None:
                rehearsal.faults.append(fault)
        entries = rehearsal.run("command 1", one, folder / "one")
        content = json.loads((folder / "one/results.json").read_text())
        bad = json.loads(json.dumps(content))
        bad["stages"]["0"] |= {
            "status": "failed with exit code 1",
            "results": [{"case": "test_gpu_fused.py", "exit_code": 1}],
        }
        for title, device, given in (
            ("command 2 after a good run, H100", H100, content),
            ("command 2 after a good run, H200", H200, content | {"environment": roomy(content)}),
            ("command 2 after a bad run", H100, bad),
        ):
            out = folder / title.replace(" ", "-").replace(",", "")
            results = out.with_suffix(".json")
            results.write_text(json.dumps(given))
            entries += rehearsal.run(title, two.replace("/tmp/first.json", str(results)), out, device)
        text = (folder / "one.txt").read_text(errors="replace")
    print("\nThe last lines of command 1 (its figures are those of a model, not of a GPU):\n" + text[-7000:])
    lines = estimate(entries)
    print("\nstage  processes  launches  kernels found  missed  estimate, s  kept, s")
    for name in (*TITLES, "other"):
        if name in lines:
            line = lines[name]
            counts = (line["processes"], line["launches"], line["hit"], line["miss"])
            kept = KEPT.get(name, "")
            print(
                f"{name:>5}  {counts[0]:9}  {counts[1]:8}  {counts[2]:13}  {counts[3]:6}  {line['seconds']:11.0f}  {kept!s:>7}"
            )
            # The whole models of stage 7 take what is left: the time that is kept is for its layers.
            if kept and line["seconds"] > kept and name != "7":
                rehearsal.faults.append(
                    f"stage {name} is estimated at {line['seconds']:.0f} s, and {kept} are kept for it"
                )
    print(
        f"An estimate is {START_S:.0f} s to start, what the counted bytes and operations take at an H100's rates, and on the"
        f" host {1e6 * OPERATION_S:.0f} us an operation, {1e6 * LAUNCH_S:.0f} us a launch and {1e3 * LOAD_S:.0f} ms for each"
        f" kernel that is loaded; {TEST_PROCESSES} processes share the tests. No GPU was there."
    )
    missed = sum(line["miss"] for line in lines.values())
    if missed:
        rehearsal.faults.append(f"{missed} kernels were not in the kit")
    print(f"\n{'FAILED: ' + '; '.join(rehearsal.faults) if rehearsal.faults else 'The rehearsal went well.'}")
    return int(bool(rehearsal.faults))


def roomy(content: dict) -> dict:
    named = "memory, max clocks of SM and memory, power limit"
    return content["environment"] | {named: [f"{DEVICES[H200]} MiB", *content["environment"][named][1:]]}


if __name__ == "__main__":
    sys.exit(main())
