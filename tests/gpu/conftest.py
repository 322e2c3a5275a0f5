"""Tests of the Triton kernels on an NVIDIA GPU, collected only where there is one: pytest tests/gpu"""

import pytest
import torch

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    # The environment variable also holds in the thread in which autograd runs backward for a GPU.
    monkeypatch.setenv("LILORA_BACKEND", "triton")


@pytest.fixture
def plan(monkeypatch):
    """plan(one_launch) says whether the phases of `linear` share a launch; the configurations are those shipped."""
    from lilora_kernels.ops import triton_runtime

    return lambda one_launch: monkeypatch.setattr(triton_runtime, "ONE_LAUNCH_ROWS", 1 << 30 if one_launch else -1)
