"""Machine, versions, commit and command: what is needed to judge a figure and to repeat it."""

import csv
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformers", "peft", "numpy", "openvino", "onnxruntime", "lilora-kernels")


def environment(command: str, on_gpu: bool, given_commit: str | None = None) -> dict:
    """What a results file says of its origin; `given_commit` is for a tree that git does not know."""
    gpu = gpu_query("name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit") if on_gpu else []
    return {
        "device": (gpu[0] if gpu else "no GPU") if on_gpu else f"{cpu_model()}, {torch.get_num_threads()} threads",
        "driver": gpu[1] if len(gpu) > 1 else None,
        "memory, max clocks of SM and memory, power limit": gpu[2:],
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: installed(package) for package in PACKAGES},
        "commit": given_commit or commit(),
        "command": command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def age_of_process() -> float:
    """Seconds since this process began, as Linux tells them; 0 elsewhere."""
    try:
        started = int(
            Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        )  # field 22, in ticks from boot
        up = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(up - started / os.sysconf("SC_CLK_TCK"), 0.0)


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_query(fields: str) -> list[str]:
    """Fields of the first GPU; none where nvidia-smi is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [field.strip() for field in found.strip().split(",")]


def clocks() -> dict[str, str]:
    fields = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    return dict(zip(fields, gpu_query(",".join(fields)), strict=False))


LOAD_FIELDS = (
    "timestamp,utilization.gpu,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active,"
    "clocks_event_reasons.sw_power_cap,clocks_event_reasons.hw_slowdown,clocks_event_reasons.sw_thermal_slowdown"
)


def under_load(path: Path) -> dict | None:
    """What the samples of LOAD_FIELDS say of the time in which the GPU was busy; None without samples."""
    if not path.is_file():
        return None
    with path.open(errors="replace") as file:
        samples = list(csv.DictReader(file, skipinitialspace=True))
    busy = [sample for sample in samples if number(sample, "utilization.gpu") >= 50]
    found: dict = {"samples": len(samples), "busy": len(busy)}
    for field in ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu"):
        values = sorted(number(sample, field) for sample in busy)
        if values:
            found[field] = {"least": values[0], "median": values[len(values) // 2], "most": values[-1]}
    reasons = [name for name in LOAD_FIELDS.split(",") if name.startswith("clocks_event_reasons.")]
    counts = {name.partition(".")[2]: sum(sample[name] == "Active" for sample in busy) for name in reasons}
    return found | {"throttled": {name: count for name, count in counts.items() if count}}


def number(sample: dict[str, str], field: str) -> float:
    """-1 where there is none."""
    try:
        return float(sample[field])
    except (TypeError, ValueError):
        return -1.0


def commit() -> str:
    """The checked-out commit, with "-dirty" when the tree differs from it; "unknown" outside a checkout."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
