"""Tests that run the CUDA kernels of csrc/ on a CPU: every thread of a grid is a fiber, tensor-core instructions are emulated.

LILORA_EMULATION=sm_80 pytest tests/emulation, or sm_90a: in a process of its own, for there the backend `cuda` takes CPU
tensors. Needs g++.
"""

import os
import zlib

import pytest

if not os.environ.get("LILORA_EMULATION"):
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config):
    if not os.environ.get("LILORA_EMULATION"):
        return
    import emulator

    from lilora_kernels import cuda_library

    if not hasattr(config, "workerinput"):
        emulator.build()
    assert cuda_library.load(emulator.LIBRARY) is None
    cuda_library.load_error = lambda: None


@pytest.fixture
def device(request):
    """The emulated device: call it to change its settings; fresh for every test, each with an order of threads of its own."""
    import emulator

    found = emulator.Device(seed=zlib.crc32(request.node.name.encode()))
    found()
    return found


@pytest.fixture(autouse=True)
def _cuda(device):
    import lilora_kernels

    with lilora_kernels.backend("cuda"):
        yield
