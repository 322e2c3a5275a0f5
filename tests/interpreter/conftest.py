"""Tests that run the Triton kernels in Triton's interpreter: only in a process started with TRITON_INTERPRET=1.

TRITON_INTERPRET=1 pytest tests/interpreter
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
