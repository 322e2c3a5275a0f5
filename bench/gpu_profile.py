"""Nsight Compute on every launch of one `linear`, forward and backward."""

import csv
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple
from shutil import which

import torch

from .peers import PEERS
from .problems import Operands, Problem
from .timing import Ceilings, Machine

METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes.sum": "dram_bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__inst_executed_pipe_tensor.sum": "tensor_instructions",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_percent",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_shared_mem": "blocks_by_shared_memory",
}


def profile(problem: Problem, machine: Machine, _: Ceilings) -> Iterator[dict]:
    ncu = which("ncu") or which("/usr/local/cuda/bin/ncu")
    if ncu is None or not machine.on_gpu:
        yield {**problem.describe(), "unavailable": "it needs Nsight Compute (ncu) and a GPU"}
        return
    found, unknown = profiled(ncu, list(METRICS), [str(size) for size in astuple(problem)[:4]])
    for metric in unknown:
        yield {**problem.describe(), "note": f"this ncu does not know the metric {metric}; it is left out"}
    lines = [line for line in found.stdout.splitlines() if line.startswith('"')]
    if found.returncode or len(lines) < 3:
        raise RuntimeError(f"ncu ended with {found.returncode}: {(found.stderr or found.stdout)[-400:]}")
    for at, launch in enumerate(csv.DictReader(lines)):
        if at == 0:  # the units
            continue
        values = {short: launch.get(metric) for metric, short in METRICS.items()}
        yield {**problem.describe(), "launch": at, "kernel": launch.get("Kernel Name"), **values}


def profiled(ncu: str, metrics: list[str], sizes: list[str]) -> tuple[subprocess.CompletedProcess, list[str]]:
    """ncu's output for one call, and the metrics that it does not know and was then not asked for."""
    unknown: list[str] = []
    call = [sys.executable, "-m", "bench.gpu_stages", "call", "--problem", *sizes]
    while True:
        options = ["--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base"]
        options += ["--kernel-name", "regex:delta_", "--metrics", ",".join(metrics)]
        found = subprocess.run([ncu, *options, *call], capture_output=True, text=True, check=False, timeout=90)
        said = found.stdout + found.stderr
        refused = [
            m for m in metrics if found.returncode and re.search(rf"metric\w*\W+{re.escape(m)}\b", said, re.IGNORECASE)
        ]
        if not refused or len(refused) == len(metrics):
            return found, unknown
        unknown += refused
        metrics = [metric for metric in metrics if metric not in refused]


def call_once(rows: int, columns: int, outputs: int, tasks: int) -> None:
    """One forward and backward of `linear`: what a profiler watches."""
    s = Operands(Problem(rows, columns, outputs, tasks, 0.05), torch.device("cuda"), 0)
    built = PEERS["ours_operation"].build([s], True)
    torch.autograd.grad(built.forward(0), built.leaves[0], s.dy)
    torch.cuda.synchronize()
