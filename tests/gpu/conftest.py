"""Tests of the Triton and CUDA kernels on an NVIDIA GPU, collected only where there is one: pytest tests/gpu"""

import importlib
import os
from contextlib import ExitStack

import pytest
import torch

import lilora_kernels
from lilora_kernels import backends, cuda_library

BACKENDS = ["triton"]
if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
else:
    if cuda_library.load_error() is None:
        BACKENDS.append("cuda")
    if not cuda_library.has_hopper() or torch.cuda.get_device_capability() != (9, 0):
        collect_ignore = ["test_gpu_fused.py"]
# Poisoned memory comes with deterministic algorithms, and those with a workspace for cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True, params=BACKENDS)
def kernels(request, monkeypatch):
    """Every test runs with Triton's kernels, and with the CUDA kernels where they are built; this is the one's module."""
    monkeypatch.setitem(backends.forced, "backend", request.param)
    return importlib.import_module(f"lilora_kernels.ops.delta.{request.param}_backend")


def pytest_collection_modifyitems(items):
    """The CUDA kernels take no fp32."""

    def is_fp32(value):
        if isinstance(value, dict | tuple):
            return any(map(is_fp32, value.values() if isinstance(value, dict) else value))
        return value is torch.float32

    def runs(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return params.get("kernels") != "cuda" or not any(map(is_fp32, params.values()))

    items[:] = filter(runs, items)


@pytest.fixture(autouse=True)
def _device_that_answers():
    """After an error of the device every later test of the process would fail: another worker takes its place."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise


@pytest.fixture
def plan():
    """plan(name) forces a plan until the end of the test."""
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(lilora_kernels.plan(name))
