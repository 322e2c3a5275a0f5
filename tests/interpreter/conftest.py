"""Tests that run the Triton kernels in Triton's interpreter: only in a process started with TRITON_INTERPRET=1.

TRITON_INTERPRET=1 pytest tests/interpreter
"""

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


def pytest_configure():
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from lilora_kernels.ops import triton_runtime

    if (fault := triton_runtime.import_fault()) is not None:
        raise pytest.UsageError(fault)
    sys.path.append(str(Path(__file__).parents[2]))
    from bench.interpreter import patch_once_a_launch

    patch_once_a_launch()
