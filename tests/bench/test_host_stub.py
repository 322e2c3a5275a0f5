"""Launches that cost nothing: Triton's own compiler and launcher, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]

WORK = """
import torch
from bench import host_stub

host_stub.install_triton()
import lilora_kernels
from lilora_kernels.ops.delta.triton_backward import delta_backward
from lilora_kernels.ops.delta.triton_forward import delta_forward

runs = []
for kernel in (delta_forward, delta_backward):
    own = kernel.run
    kernel.run = lambda *args, own=own, **more: runs.append(1) or own(*args, **more)
a, b0 = torch.randn(16, 32), torch.randn(32, 16)
with lilora_kernels.backend("triton"):
    for rows in (5, 5, 9, 5):
        x = torch.randn(rows, 32, requires_grad=True)
        y = lilora_kernels.delta(x, a, b0)
        torch.autograd.grad(y, x, torch.randn(rows, 32))
        print(len(runs), y.shape[0])
"""
LAYERS = """
import sys
import torch
from bench import host_stub

host_stub.install_triton()
from lilora_kernels import LiLoRALinear, backend

counts = []
for layers in (1, 5):
    model = torch.nn.Sequential(*(LiLoRALinear(torch.nn.Linear(32, 32), 16, 8, dropout=0.0) for _ in range(layers)))
    for layer in model:
        layer.add_task("one")
    x, dy = torch.randn(8, 32, requires_grad=True), torch.randn(8, 32)
    calls = []
    with backend("triton"):
        for step in range(5):
            sys.setprofile(lambda frame, event, argument: calls.append(1) if event == "call" and step == 4 else None)
            model(x).backward(dy)
            sys.setprofile(None)
    counts.append(len(calls))
print((counts[1] - counts[0]) / 4)
"""


def output(code):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_only_the_first_step_goes_through_jit_function_run():
    assert output(WORK) == ["2", "5", "2", "5", "2", "9", "2", "5"]


def test_python_calls_of_a_training_step_of_each_further_layer():
    """A ceiling: lower it when a change does better."""
    (calls,) = output(LAYERS)
    assert float(calls) <= 100
